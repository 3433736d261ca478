"""Every published layout, pruned by the command: loads in stock transformers, whole and exact."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from masking import masked
from places import CALIBRATION, EVAL
from published.layouts import LAYOUTS
from published.make import READERS, Layout, lay_out
from safetensors.torch import load_file
from transformers import AutoConfig, AutoTokenizer, FineGrainedFP8Config

from moe_fair.cli import main
from moe_fair.core.plan import Plan
from moe_fair.engines.auto import auto_class
from moe_fair.moe.blocks import COUNTERS
from moe_fair.moe.checkpoint_source import Checkpoint

pytestmark = pytest.mark.slow  # whole runs, by and large

SERVED = [x for x in LAYOUTS if not x.refused]
REFUSED = [x for x in LAYOUTS if x.refused]
UNIFORM = ("--method", "reap", "--allocate", "uniform")
UNEQUAL = ("--method", "second-order", "--rivals", "none")
KEPT = 6
NIGHTLY = (pytest.mark.nightly,)
# an expert a tensor; packed in FP8 blocks; fused and transposed; groups and a bias for the choice;
# one fused tensor; transposed experts
ALIKE = (
    "Qwen1.5-MoE-A2.7B-Chat",
    "Qwen3-Coder-30B-A3B-Instruct-FP8",
    "Qwen3-VL-30B-A3B-Instruct",
    "DeepSeek-V3-(without-its-MTP-layer)",
    "dbrx-instruct",
    "gpt-oss-20b-(before-it-was-packed)",
)
# laid out as another one is
OF_A_KIND = (
    "Kimi-K2-Instruct", "Moonlight-16B-A3B-Instruct",  # DeepSeek-V3, in FP8 or not
    "dots.llm1.inst", "OLMoE-1B-7B-0924",  # Qwen3-30B-A3B
    "Qwen3-30B-A3B-FP4,-its-own-config-telling-it",
    "DeepSeek-V4-Flash-(unpacked,-without-its-MTP-layer)",
)  # fmt: skip


def _name(layout: Layout) -> str:
    return layout.name.rpartition("/")[2].replace(" ", "-")


def _ways() -> list[Any]:
    """Every layout cut unequally and repaired, one of a kind alike and as it is; all by night."""
    found = []
    for x in SERVED:
        alike = () if _name(x) in ALIKE else NIGHTLY
        for shape, repair, marks in (
            (UNEQUAL, "refit", NIGHTLY if _name(x) in OF_A_KIND else ()),
            (UNIFORM, "none", alike),
            (UNIFORM, "refit", NIGHTLY),
            (UNEQUAL, "none", NIGHTLY),
        ):
            name = f"{_name(x)}-{'uniform' if shape is UNIFORM else 'unequal'}-{repair}"
            found.append(pytest.param(x, shape, repair, marks=marks, id=name))
    return found


@pytest.fixture(scope="module")
def published(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Layout, Path]:
    folder = tmp_path_factory.mktemp("published") / "checkpoint"
    if request.param.needs:
        pytest.importorskip(request.param.needs, reason="an optional extra: moe_fair[packed]")
    return request.param, lay_out(request.param, folder)


def _prune(layout: Layout, folder: Path, out: Path, *how: str) -> None:
    with pytest.raises(SystemExit) as stop:
        main(
            ["prune", str(folder), "-o", str(out), "--experts", str(KEPT), "-c", str(CALIBRATION),
             "--samples", "8", "--length", "32", *layout.flags, *layout.pruning, *how]
        )  # fmt: skip
    assert stop.value.code == 0


@pytest.mark.parametrize(("published", "shape", "repair"), _ways(), indirect=["published"])
def test_pruned_as_published(
    published: tuple[Layout, Path],
    shape: tuple[str, ...],
    repair: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    layout, folder = published
    out = tmp_path / "out"
    # where no repair can be, the default is left out with a line
    asked = () if layout.unrepaired and repair != "none" else ("--repair", repair)
    _prune(layout, folder, out, *shape, *asked)
    said = capsys.readouterr().err
    if layout.unrepaired and repair != "none":
        [note] = [x for x in said.splitlines() if x.startswith("note: not repaired: ")]
        assert layout.unrepaired in note
    plan = Plan.load(out / "moe_fair" / "plan.json")
    stock = plan.uniform and not layout.whole
    model = _stock(out, layout, unequal=not stock)
    ids = torch.arange(3, 51).view(2, 24)
    with torch.no_grad():
        logits = model(input_ids=ids).logits
    assert bool(torch.isfinite(logits).all())
    if repair == "none" or layout.unrepaired:
        original = _stock(folder, layout, unequal=False)
        with torch.no_grad(), masked(original, plan.kept):
            expected = original(input_ids=ids).logits
        with torch.no_grad():
            whole = original(input_ids=ids).logits
        assert (logits - expected).abs().max() <= 1e-5 * expected.abs().max()
        assert (logits - whole).abs().max() > 1e-3  # the mask did something
    else:
        assert json.loads((out / "moe_fair" / "repair.json").read_text())
    code = [n for n in layout.files if n.endswith(".py") and n not in layout.travels]
    assert ("left behind: " in said) == bool(_left(layout))
    assert not code or code[0] in said
    _check_config(layout, out, plan, stock)
    _check_side_files(layout, folder, out, stock)
    with pytest.raises(SystemExit) as stop:
        main(["verify", str(out), "--against", str(folder), *layout.flags])
    assert stop.value.code == 0, capsys.readouterr().out


def _left(layout: Layout) -> list[str]:
    """Side files that the line about those left behind must tell."""
    plain = (".gitattributes", "README.md", "consolidated.safetensors.index.json")
    return [n for n in layout.files if n not in (*layout.travels, *READERS, *plain)]


def _stock(folder: Path, layout: Layout, unequal: bool) -> Any:
    """The model as a stranger to moe_fair loads it; nothing missing, unexpected or mismatched."""
    own = Checkpoint(str(folder), None, True)
    if own.scheme is not None and own.scheme.name not in ("fp8", "mxfp4"):
        return own.load("float32", "cpu").eval()  # transformers does not unpack these
    settings: dict[str, Any] = {"trust_remote_code": unequal}
    if "quantization_config" in layout.config:
        settings["quantization_config"] = FineGrainedFP8Config(dequantize=True)
    if folder.name == "checkpoint":  # the published config may name code, or another type
        config = Checkpoint(str(folder), None, True).config
        settings["config"] = config
    else:
        config = AutoConfig.from_pretrained(folder, trust_remote_code=unequal)
    model, info = auto_class(config).from_pretrained(
        folder, dtype=torch.float32, output_loading_info=True, **settings
    )
    for wrong in ("missing_keys", "unexpected_keys", "mismatched_keys"):
        assert not info[wrong], (wrong, sorted(info[wrong])[:3])
    return model.float().eval()


def _check_config(layout: Layout, out: Path, plan: Plan, stock: bool) -> None:
    """No count of before the cut is left, and what others look up is as it was published."""
    config = json.loads((out / "config.json").read_text())
    assert config["architectures"] == layout.config["architectures"]
    assert ("auto_map" in config) == (not stock)
    counts = {len(g.kept) for g in plan.groups}
    if stock:
        assert {v for k, v in _walk(config) if k in COUNTERS} == counts
        assert "moe_fair" not in config
    names = [v for _, v in _walk(config) if isinstance(v, str) and ".experts." in v]
    for name in names:  # of single experts: each is one that is there
        head, _, tail = name.partition(".experts.")
        assert int(tail.split(".")[0]) < len(plan.kept[f"{head}"]), name
    if "moe_capacity" in config:
        assert config["moe_capacity"] == [max(counts)] * 3


def _walk(value: Any, key: str = "") -> Iterator[tuple[str, Any]]:
    if isinstance(value, dict):
        for k, v in value.items():
            if k not in ("moe_fair", "per_layer_config"):
                yield from _walk(v, k)
    elif isinstance(value, list):
        for v in value:
            yield from _walk(v)
    else:
        yield key, value


def _check_side_files(layout: Layout, folder: Path, out: Path, stock: bool) -> None:
    """Exactly what should go along did, byte for byte."""
    code = {"modeling_moe_fair.py", "mlx_moe_fair.py"} if not stock else set()
    weights = {p.name for p in out.glob("model*.safetensors*")}
    there = {
        p.relative_to(out).as_posix()
        for p in out.rglob("*")
        if p.is_file() and p.parent.name != "moe_fair"
    }
    assert there - weights - code == {"config.json", *READERS, *layout.travels}
    for name in (*READERS, *layout.travels):
        assert (out / name).read_bytes() == (folder / name).read_bytes(), name
    trusted = bool(layout.flags)
    tokenizers = [AutoTokenizer.from_pretrained(f, trust_remote_code=trusted) for f in (out,)]
    assert len(tokenizers[0]("def f(x):")["input_ids"]) > 1


def test_repaired_values_are_written_in_the_stored_layout(tmp_path: Path) -> None:
    """Experts stored transposed: the repaired result is that of the model's own layout, turned."""
    layout = next(x for x in LAYOUTS if "Qwen3-VL" in x.name)
    found = []
    for i, kind in enumerate((layout, replace(layout, stored=None))):
        folder, out = lay_out(kind, tmp_path / f"{i}" / "checkpoint"), tmp_path / f"out{i}"
        _prune(layout, folder, out, *UNIFORM, "--repair", "distill")
        found.append(load_file(out / "model.safetensors"))
    turned, plain = found
    changed = 0
    for name, t in plain.items():
        if ".mlp.experts." in name:
            assert turned[name].shape != t.shape
            changed += 1
        assert torch.equal(
            turned[name].transpose(1, 2) if ".mlp.experts." in name else turned[name], t
        )
    assert changed == 6


@pytest.mark.parametrize("layout", REFUSED, ids=_name)
def test_refused_before_anything_is_measured(layout: Layout, tmp_path: Path, fails: Any) -> None:
    folder = lay_out(layout, tmp_path / "checkpoint")
    line = fails(
        "prune", folder, "-o", tmp_path / "out", "--experts", KEPT, "-c", CALIBRATION,
        "--samples", 8, "--length", 32,
    )  # fmt: skip
    assert layout.refused in line
    assert sorted(p.name for p in tmp_path.iterdir()) == ["checkpoint"]


def test_a_tokenizer_that_is_code_names_the_flag(tmp_path: Path, fails: Any) -> None:
    moonlight = next(x for x in LAYOUTS if "Moonlight" in x.name)
    folder = lay_out(moonlight, tmp_path / "checkpoint")
    given = ["prune", folder, "-o", tmp_path / "out", "--experts", KEPT, "-c", CALIBRATION]
    line = fails(*given, *UNIFORM)
    assert "its tokenizer is code that lies beside the weights (tokenization_kimi.py)" in line
    assert "--trust-remote-code" in line
    line = fails(*given)  # unequal counts bring our modeling file, which would lie beside it
    assert "tokenizer_config.json names code to be run" in line
    assert "--trust-remote-code" in line


# what lies in a folder -> words of the line that tells it
OTHERS = {
    "a LoRA adapter": ({"adapter_config.json": "{}", "adapter_model.safetensors": "x"}, "adapter"),
    "GGUF alone": ({"model-Q4_K_M.gguf": "GGUF"}, "GGUF"),
    "GGUF and a config": (
        {"config.json": '{"model_type": "mixtral"}', "model.gguf": "GGUF"}, "GGUF"
    ),
    "an MLX copy": (
        {"config.json": '{"model_type": "qwen3_moe", "quantization": {"bits": 4}}'}, "MLX"
    ),
    "LFS pointers": (
        {
            "config.json": '{"model_type": "mixtral"}',
            "model.safetensors": "version https://git-lfs.github.com/spec/v1\noid sha256:1\n",
        },
        "git lfs pull",
    ),
    "shards without an index": (
        {
            "config.json": '{"model_type": "mixtral"}',
            "model-00001-of-00002.safetensors": "x", "model-00002-of-00002.safetensors": "x",
        },
        "no model.safetensors.index.json",
    ),
    "the vendor's own layout": ({"params.json": "{}", "consolidated.00.pth": "x"}, "params.json"),
    "a type that transformers has not": (
        {"config.json": '{"model_type": "pangu_ultra", "auto_map": {"AutoConfig": "a.B"}}'},
        "no class for model type 'pangu_ultra'",
    ),
    "an unknown activation": (
        {"config.json": '{"model_type": "qwen3_moe", "hidden_act": "swiglu", "head_dim": 16}'},
        "swiglu",
    ),
    "a config that is no object": ({"config.json": "[]"}, "no settings"),
}  # fmt: skip


@pytest.mark.parametrize("kind", OTHERS)
def test_folders_that_are_something_else_are_told_apart(
    kind: str, tmp_path: Path, fails: Any
) -> None:
    files, words = OTHERS[kind]
    folder = tmp_path / "model"
    folder.mkdir()
    for name, text in files.items():
        (folder / name).write_text(text)
    line = fails("prune", folder, "-o", tmp_path / "out", "--experts", KEPT, "-c", CALIBRATION)
    assert words in line


def test_qwen3_omni_is_refused_in_words(tmp_path: Path, fails: Any) -> None:
    folder = tmp_path / "model"
    folder.mkdir()
    config = {
        "model_type": "qwen3_omni_moe", "architectures": ["Qwen3OmniMoeForConditionalGeneration"]
    }  # fmt: skip
    (folder / "config.json").write_text(json.dumps(config))
    shutil.copyfile(CALIBRATION / "python.jsonl", folder / "notes.jsonl")
    line = fails("prune", folder, "-o", tmp_path / "out", "--experts", KEPT, "-c", CALIBRATION)
    assert "qwen3_omni_moe" in line or "Qwen3Omni" in line


@pytest.mark.nightly
def test_lm_eval_asks_a_model_of_another_name_with_a_tokenizer_of_its_own(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    layout = next(x for x in LAYOUTS if x.name.endswith("Kimi-K2-Instruct"))
    config = {k: v for k, v in layout.config.items() if k != "quantization_config"}
    plain = replace(layout, config=config, stored=None, names=())
    folder, out = lay_out(plain, tmp_path / "checkpoint"), tmp_path / "out"
    _prune(layout, folder, out, *UNEQUAL, "--repair", "none")
    tasks = ["--tasks", "local_choice_python", "--include-path", str(EVAL / "tasks")]
    with pytest.raises(SystemExit) as stop:
        main(
            ["eval", str(out), "--baseline", str(folder), *tasks, "--limit", "2", "--json",
             *layout.flags]
        )  # fmt: skip
    assert stop.value.code == 0, capsys.readouterr().err
    assert (out / "moe_fair" / "benchmarks.json").is_file()
