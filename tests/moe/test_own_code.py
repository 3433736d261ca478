"""Which folders' code is run unasked: a released modeling file, and no other code beside it."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from places import CALIBRATION, MODEL
from transformers import AutoTokenizer, Qwen2MoeForCausalLM

import moe_fair
from moe_fair.core.manifest import MANIFEST, write_manifest
from moe_fair.moe.checkpoint_source import Checkpoint
from moe_fair.moe.trusted_code import (
    MLX_FILE,
    MLX_TEMPLATE,
    MODELING_FILE,
    RELEASED,
    RELEASED_MLX,
    TEMPLATE,
    modeling_source,
    not_ours,
    template_digest,
)
from moe_fair.pipelines.verify import verify

GENERATE = "import os\nos.mkdir({path!r})\ndef generate(model, *a, **k): return None\n"


@pytest.fixture(scope="module")
def pruned(tmp_path_factory: pytest.TempPathFactory, statistics_folder: Path) -> Path:
    out = tmp_path_factory.mktemp("pruned") / "out"
    moe_fair.prune(
        str(MODEL), out, statistics=statistics_folder, experts=40, method="fair", repair="none"
    )
    assert not not_ours(out)
    return out


@pytest.fixture
def out(pruned: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(pruned, tmp_path / "out"))


def test_the_present_template_is_a_released_one() -> None:
    """Who changes it adds its digest to the list; none is ever taken out."""
    assert template_digest(TEMPLATE.read_text()) in RELEASED
    assert template_digest(modeling_source(Qwen2MoeForCausalLM)) in RELEASED
    assert len(RELEASED) >= 6


@pytest.mark.slow
def test_hostile_generate_is_not_run(out: Path, tmp_path: Path) -> None:
    """The manifest written anew does not help, nor that our own file is as it was."""
    mark = tmp_path / "mark"
    (out / "custom_generate").mkdir()
    (out / "custom_generate" / "generate.py").write_text(GENERATE.format(path=str(mark)))
    write_manifest(out)
    with pytest.raises(ValueError, match=r"custom_generate/generate\.py is code that moe_fair"):
        Checkpoint(str(out))
    found = verify(out)
    assert "custom_generate/generate.py" in {c.name: c.detail for c in found.checks}["code"]
    assert not found.ok
    assert not mark.exists()
    Checkpoint(str(out), trust_remote_code=True).load("float32", "cpu")
    assert mark.exists()  # it is what transformers would have run


def hidden(o: Path) -> None:
    (o / "moe_fair" / "deep").mkdir()
    (o / "moe_fair" / "deep" / "Evil.PY").write_text("x")


def linked(o: Path) -> None:
    (o.parent / "elsewhere").mkdir()
    (o.parent / "elsewhere" / "generate.py").write_text("x")
    (o / "custom_generate").symlink_to(o.parent / "elsewhere")


def edit(name: str, **change: object) -> Callable[[Path], None]:
    def run(o: Path) -> None:
        file = o / name
        content = json.loads(file.read_text()) if file.exists() else {}
        file.write_text(json.dumps({**content, **change}))

    return run


def imported(module: str) -> Callable[[Path], None]:
    def run(o: Path) -> None:
        text = (o / MODELING_FILE).read_text()
        stock = "transformers.models.qwen2_moe.modeling_qwen2_moe"
        assert f"from {stock} import" in text
        (o / MODELING_FILE).write_text(
            text.replace(f"from {stock} import", f"from {module} import")
        )

    return run


@pytest.mark.parametrize(
    ("spoil", "said"),
    [
        (imported("transformers_modules.x"), "not as any version"),
        (imported("transformersx"), "not as any version"),
        (imported("transformers.models..x"), "not as any version"),
        (hidden, "moe_fair/deep/Evil.PY"),
        (linked, "custom_generate is a link"),
        (lambda o: (o / "lib.so").write_bytes(b"x"), "lib.so"),
        (lambda o: (o / "training_args.bin").write_bytes(b"x"), "training_args.bin"),
        (edit("tokenizer_config.json", auto_map={"AutoTokenizer": ["a--b.C", None]}), "tokenizer_"),
        (edit("processor_config.json", auto_map={"AutoProcessor": "b.C"}), "processor_config.json"),
        (edit("generation_config.json", deep=[{"auto_map": {"x": "b.C"}}]), "generation_config"),
        (edit("config.json", text_config={"auto_map": {"AutoModel": "b.C"}}), "config.json names"),
        (edit("config.json", custom_pipelines={"x": {"impl": "b.C"}}), "config.json names code"),
        (edit("config.json", auto_map={"AutoModelForCausalLM": "b.C"}), "not moe_fair's"),
        (edit("config.json", auto_map={"AutoModelForCausalLM": ["b.C"]}), "no code of moe_fair"),
        (edit("config.json", auto_map=["b.C"]), "no code of moe_fair"),
        (edit("adapter_config.json", base_model_name_or_path="a/b"), "adapter_config.json"),
        (lambda o: (o / "special_tokens_map.json").write_text("[" * 100_000), "cannot be read"),
        (lambda o: (o / MODELING_FILE).unlink(), "is missing"),
        (lambda o: (o / MODELING_FILE).write_bytes(b"\xff"), "decode"),
        (lambda o: (o / MLX_FILE).write_text("x = 1"), "mlx_moe_fair.py is not as any version"),
        (edit("config.json", model_file="other.py"), "not moe_fair's"),
    ],
)  # fmt: skip
def test_other_code_makes_it_somebody_elses(
    out: Path, spoil: Callable[[Path], object], said: str
) -> None:
    spoil(out)
    write_manifest(out)
    assert said in not_ours(out)


def test_the_file_for_mlx(out: Path, tmp_path: Path) -> None:
    """The present one is released, results of before have none, and the result verifies."""
    assert (out / MLX_FILE).read_bytes() == MLX_TEMPLATE.read_bytes()
    assert hashlib.sha256(MLX_TEMPLATE.read_bytes()).hexdigest() in RELEASED_MLX
    original = Checkpoint(str(MODEL))
    assert verify(out, original).ok
    listed = json.loads((out / MANIFEST).read_text())
    del listed["files"][MLX_FILE]
    (out / MANIFEST).write_text(json.dumps(listed))
    assert "mlx_moe_fair.py is not the one that" in not_ours(out)
    config = json.loads((out / "config.json").read_text())
    assert config.pop("model_file") == MLX_FILE
    (out / MLX_FILE).unlink()
    write_manifest(out)
    found = {c.name: c.detail for c in verify(out, original).checks}
    assert """model_file is "mlx_moe_fair.py", not null""" in found["config"]
    (out / "config.json").write_text(json.dumps(config))
    write_manifest(out)
    assert not not_ours(out)
    assert verify(out, original).ok


def test_the_manifest_must_list_it_where_there_is_one(out: Path) -> None:
    other = modeling_source(type("Qwen3MoeForCausalLM", (), {"__module__": "transformers"}))
    (out / MODELING_FILE).write_text(other)
    assert "is not the one that moe_fair/manifest.json lists" in not_ours(out)
    listed = json.loads((out / MANIFEST).read_text())
    del listed["files"][MODELING_FILE]
    (out / MANIFEST).write_text(json.dumps(listed))
    assert "is not the one that moe_fair/manifest.json lists" in not_ours(out)
    (out / MANIFEST).write_text("{}")
    assert "is not a list of files" in not_ours(out)
    (out / MANIFEST).unlink()  # a result of before there were manifests, or saved again
    assert not not_ours(out)


def test_a_vocabulary_may_hold_such_a_word(out: Path) -> None:
    (out / "vocab.json").write_text('{"auto_map": 5}')
    write_manifest(out)
    assert not not_ours(out)
    AutoTokenizer.from_pretrained(out)


def test_a_class_of_somebody_elses_is_not_built_upon() -> None:
    theirs = type("Theirs", (), {"__module__": "transformers_modules.x.modeling_x"})
    with pytest.raises(ValueError, match=r"Theirs is of transformers_modules\.x"):
        modeling_source(theirs)


@pytest.mark.parametrize(
    "given", [{"attn_implementation": "a/b"}, {"_attn_implementation": {"text_config": "a/b:c"}}]
)
def test_kernels_of_the_hub_are_code(out: Path, tmp_path: Path, given: dict[str, object]) -> None:
    stock = Path(shutil.copytree(MODEL, tmp_path / "stock"))
    for folder in (out, stock):
        edit("config.json", **given)(folder)
        with pytest.raises(ValueError, match=r"asks for a/b.*--trust-remote-code"):
            Checkpoint(str(folder))


@pytest.mark.slow
def test_a_model_whose_tokenizer_names_code_is_told_before_it_is_measured(
    tmp_path: Path, statistics_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its unequal result would not be ours: that is no news for the end of a long run."""
    model = Path(shutil.copytree(MODEL, tmp_path / "model"))
    edit("tokenizer_config.json", auto_map={"AutoTokenizer": ["none.C", None]})(model)
    monkeypatch.setattr(Checkpoint, "load", None)
    with pytest.raises(ValueError, match=r"tokenizer_config\.json names code.*--allocate uniform"):
        moe_fair.prune(str(model), tmp_path / "out", experts=40)
    monkeypatch.undo()
    text = {"calibration": str(CALIBRATION), "samples": 4, "length": 32, "repair": "none"}
    done = moe_fair.prune(
        str(model), tmp_path / "out", experts=40, method="reap", allocate="uniform", **text
    )
    assert verify(done.output, Checkpoint(str(model))).ok
