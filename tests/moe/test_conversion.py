"""Results that are stored otherwise than their originals (--save-as), by their readers' code."""

from __future__ import annotations

import json
import shutil
import sys
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from flow import kept_experts, some
from packing import SCHEMES, Stored, compressed, fp8, mxfp4, rewrite, tensors_of
from places import CALIBRATION, HELDOUT, MODEL
from test_repair import batches
from tiny import tiny_model
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer, CompressedTensorsConfig

from moe_fair.cli import main
from moe_fair.core.plan import Plan
from moe_fair.core.recipe import Recipe
from moe_fair.engines.packing.scheme import CODES
from moe_fair.engines.packing.targets import target
from moe_fair.moe.checkpoint_source import Checkpoint
from moe_fair.moe.checkpoint_writer import write_model
from moe_fair.moe.conversion import Conversion
from moe_fair.moe.engine_choice import start_layerwise
from moe_fair.moe.repacking import Repacking
from moe_fair.moe.repair import Repairer
from moe_fair.pipelines.preflight import _conversion
from moe_fair.pipelines.verify import verify
from moe_fair.report.sources import gather

pytestmark = pytest.mark.slow  # whole runs, by and large

WIDE = {
    "hidden_size": 128, "moe_intermediate_size": 128, "intermediate_size": 256,
    "num_attention_heads": 4, "num_key_value_heads": 4, "head_dim": 32,
}  # fmt: skip
# kind -> sizes whose experts, and some of whose other modules, divide into squares of 128
KINDS: dict[str, dict[str, Any]] = {
    "qwen3_moe": WIDE, "qwen2_moe": WIDE | {"shared_expert_intermediate_size": 256},
    # its latent attention has matrices of 24 and 32 rows
    "deepseek_v3": {k: v for k, v in WIDE.items() if k != "head_dim"},
}  # fmt: skip


def _written(folder: Path, kind: str, dtype: torch.dtype = torch.float32) -> Checkpoint:
    tiny_model(kind, **KINDS[kind]).to(dtype).save_pretrained(folder)
    return Checkpoint(str(folder))


def _cut(stored: Stored, source: Checkpoint, kept: dict[str, list[int]]) -> Stored:
    """By hand: the numbered experts that stay under their new numbers, rows of the others."""
    found: Stored = {}
    for name, t in stored.items():
        block = next((b for b in kept if name.startswith(b)), None)
        head, _, rest = name.partition(".experts.")
        number = rest.partition(".")[0]
        if block is None:
            found[name] = t
        elif number.isdigit():
            if int(number) in kept[block]:
                place = kept[block].index(int(number))
                found[f"{head}.experts.{place}.{rest.partition('.')[2]}"] = t
        elif ".experts." in name or ".gate." in name or ".router." in name:
            found[name] = t[kept[block]]
        else:
            found[name] = t
    return found


@pytest.mark.parametrize("scheme", SCHEMES)
def test_bf16_of_a_packed_model_is_its_own_unpacking(scheme: str, tmp_path: Path) -> None:
    plain = SCHEMES[scheme](tmp_path / "model")
    source = Checkpoint(str(tmp_path / "model"))
    kept = kept_experts(source, True)
    conversion = Conversion(source, "bf16")
    write_model(source, kept, tmp_path / "out", conversion=conversion)
    found, wanted = tensors_of(tmp_path / "out"), _cut(plain, source, kept)
    assert found.keys() == wanted.keys()
    for name, t in found.items():
        assert t.dtype == torch.bfloat16, name
        assert torch.equal(t, wanted[name].to(torch.bfloat16)), name
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert "quantization_config" not in config
    assert config["dtype"] == "bfloat16"
    assert not (tmp_path / "out" / "hf_quant_config.json").exists()
    size = source.size.without(source.groups, {n: len(ids) for n, ids in kept.items()})
    assert conversion.size(size).bytes == pytest.approx(
        sum(t.nbytes for t in found.values()), rel=0.03
    )
    AutoModelForCausalLM.from_pretrained(tmp_path / "out")


def _packed_by_hand(name: str, source: Checkpoint) -> dict[str, Tensor]:
    """Model name-free: every stored matrix of a plain checkpoint as it is after a round trip."""
    its = target(name)
    found = {}
    for stored, t in tensors_of(source.path).items():
        if t.dim() == 2 and not any(n % 128 for n in t.shape):
            weight = its.weight(stored, tuple(t.shape))
            found[stored] = its.unpack(weight, its.pack(weight, t))
    return found


@pytest.mark.parametrize(
    "uniform", [pytest.param(True, marks=pytest.mark.nightly), False], ids=["uniform", "unequal"]
)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", ["fp8", "w4a16"])
def test_packed_on_the_way_out(name: str, kind: str, uniform: bool, tmp_path: Path) -> None:
    if name == "w4a16":
        pytest.importorskip("compressed_tensors", reason="an optional extra: moe_fair[packed]")
    source = _written(tmp_path / "model", kind)
    kept = {b.name: some(b, i, uniform) for i, b in enumerate(source.blocks)}
    conversion = Conversion(source, name)
    write_model(source, kept, tmp_path / "out", conversion=conversion)
    result = Checkpoint(str(tmp_path / "out"))
    assert result.packing is not None
    packs = {n.rpartition(".")[0] for n in result.packing.weights}
    assert all(f"{b.name}.experts.0.up_proj" in packs for b in result.blocks)
    latent = kind == "deepseek_v3"
    assert ("model.layers.1.self_attn.o_proj" in packs) == (not latent)
    assert not any("gate" in n.rpartition(".")[2] and "gate_proj" not in n for n in packs)
    assert not packs & {"lm_head", "model.embed_tokens"}
    # what is packed is the round trip of the original, and all else its rounding
    trip = _cut(_packed_by_hand(name, source), source, kept)
    plain = _cut(tensors_of(source.path), source, kept)
    stored = tensors_of(tmp_path / "out")
    for n, w in result.packing.weights.items():
        parts = {r: stored[t.name] for r, t in w.parts.items()}
        assert torch.equal(result.packing.scheme.unpack(w, parts), trip[n]), n
        assert float((trip[n] - plain[n]).norm() / plain[n].norm()) < 0.2
    owned = result.packing.owners
    for n, t in stored.items():
        if n not in owned:
            assert torch.equal(t, plain[n].to(t.dtype)), n
            assert t.dtype == (torch.float32 if "correction_bias" in n else torch.bfloat16), n
    assert len(result.packing.weights) + len([n for n in stored if n not in owned]) == len(plain)
    # what a reader is told to leave alone is just what is there unpacked
    settings = result.published["quantization_config"]
    told = set(settings[conversion.target.plain])
    alone = {n.removesuffix(".weight") for n, t in stored.items()
             if n not in owned and n.endswith(".weight") and t.dim() == 2}  # fmt: skip
    assert told == alone
    assert conversion.size(source.size).bytes < source.size.bytes / 2.4


@pytest.mark.parametrize("name", ["fp8", "w4a16"])
def test_read_by_transformers(name: str, tmp_path: Path) -> None:
    """On a CPU it unpacks FP8 by itself; what it then has is what our reader has."""
    if name == "w4a16":
        pytest.importorskip("compressed_tensors", reason="an optional extra: moe_fair[packed]")
    source = _written(tmp_path / "model", "qwen3_moe", torch.bfloat16)
    kept = kept_experts(source, True)
    write_model(source, kept, tmp_path / "out", conversion=Conversion(source, name))
    ours = Checkpoint(str(tmp_path / "out")).load("bfloat16", "cpu")
    more: dict[str, Any] = {}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # that there are two settings
        if name == "w4a16":
            said = json.loads((tmp_path / "out" / "config.json").read_text())
            settings = CompressedTensorsConfig(**said["quantization_config"], dequantize=True)
            more = {"quantization_config": settings}
        theirs = AutoModelForCausalLM.from_pretrained(
            tmp_path / "out", dtype=torch.bfloat16, **more
        )
    a, b = ours.state_dict(), theirs.state_dict()
    assert a.keys() == b.keys()
    for n, t in a.items():
        assert torch.allclose(t.float(), b[n].float(), rtol=2**-7, atol=0), n


def test_compressed_tensors_unpacks_its_own(tmp_path: Path) -> None:
    pytest.importorskip("compressed_tensors", reason="an optional extra: moe_fair[packed]")
    from compressed_tensors.compressors import BaseCompressor
    from compressed_tensors.quantization import QuantizationConfig

    source = _written(tmp_path / "model", "qwen3_moe")
    kept = kept_experts(source, False)
    write_model(source, kept, tmp_path / "out", conversion=Conversion(source, "w4a16"))
    result = Checkpoint(str(tmp_path / "out"))
    settings = QuantizationConfig.model_validate(result.published["quantization_config"])
    [group] = settings.config_groups.values()
    compressor = BaseCompressor.get_value_from_registry(group.format)
    stored, plain = tensors_of(tmp_path / "out"), tensors_of(tmp_path / "model")
    plain = _cut(plain, source, kept)
    assert result.packing is not None
    for name in result.packing.weights:
        home = name.removesuffix("weight")
        state = {n.removeprefix(home): t for n, t in stored.items() if n.startswith(home)}
        got = compressor.decompress(state, group)["weight"].float()
        assert float((got - plain[name]).norm() / plain[name].norm()) < 0.15


@pytest.mark.parametrize(
    ("made", "name"),
    [
        ("qwen3_moe", "fp8"),
        pytest.param("qwen2_moe", "w4a16", marks=pytest.mark.nightly),
        pytest.param("packed", "bf16", marks=pytest.mark.nightly),
        ("mxfp4", "bf16"),
    ],
)
def test_a_repair_is_written_as_it_was_judged(made: str, name: str, tmp_path: Path) -> None:
    if name == "w4a16":
        pytest.importorskip("compressed_tensors", reason="an optional extra: moe_fair[packed]")
    if made in KINDS:
        source = _written(tmp_path / "model", made)
    else:
        {"packed": fp8, "mxfp4": mxfp4}[made](tmp_path / "model")
        source = Checkpoint(str(tmp_path / "model"))
    kept = {b.name: some(b, i, True) for i, b in enumerate(source.blocks)}
    conversion, files = Conversion(source, name), []
    for engine_name in ("resident", "streaming"):
        engine = start_layerwise(source, engine_name, "float32", "cpu", lambda w, i, b: iter(b))
        folder = tmp_path / engine_name
        folder.mkdir()
        done = Repairer(
            engine, kept, "refit", folder=folder, key="k",
            repacking=Repacking(source, kept, conversion),
        ).run(batches())  # fmt: skip
        assert any(d.repair == "refit" for d in done)
        out = tmp_path / f"{engine_name}-out"
        write_model(source, kept, out, repaired=folder, conversion=conversion)
        files.append((out / "model.safetensors").read_bytes())
        if engine_name == "resident":
            model = engine.model.state_dict()
            found = Checkpoint(str(out)).load("float32", "cpu").state_dict()
            for n in (n for n in model if "experts" in n and "shared" not in n):
                if name == "bf16":  # of what no repair changed this is what the writer does
                    assert torch.equal(found[n], model[n].bfloat16().float()), n
                else:
                    assert torch.equal(found[n], model[n]), n
    assert files[0] == files[1]
    write_model(source, kept, tmp_path / "cut", conversion=conversion)
    assert files[0] != (tmp_path / "cut" / "model.safetensors").read_bytes()


def test_four_bits_of_a_model_in_fp8(tmp_path: Path) -> None:
    """From one packing to another: modules that do not divide become bfloat16."""
    pytest.importorskip("compressed_tensors", reason="an optional extra: moe_fair[packed]")
    source = _written(tmp_path / "plain", "qwen3_moe")
    kept = {b.name: list(range(b.num_experts)) for b in source.blocks}
    write_model(source, kept, tmp_path / "fp8", conversion=Conversion(source, "fp8"))
    between = Checkpoint(str(tmp_path / "fp8"))
    write_model(between, kept, tmp_path / "out", conversion=Conversion(between, "w4a16"))
    found = Checkpoint(str(tmp_path / "out"))
    assert found.packing is not None
    assert between.packing is not None
    assert found.packing.weights.keys() == between.packing.weights.keys()
    model, wanted = (c.load("float32", "cpu").state_dict() for c in (found, source))
    for n, t in model.items():
        assert float((t - wanted[n]).norm() / wanted[n].norm()) < 0.2, n


def test_input_scales_go_with_the_packing(tmp_path: Path) -> None:
    SCHEMES["ModelOpt FP8"](tmp_path / "model")
    source = Checkpoint(str(tmp_path / "model"))
    kept = kept_experts(source, True)
    write_model(source, kept, tmp_path / "out", conversion=Conversion(source, "bf16"))
    assert not [n for n in tensors_of(tmp_path / "out") if "scale" in n]


@pytest.fixture(scope="module")
def whole_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model of the reference's tokenizer, and what the command makes of it in one go."""
    folder = tmp_path_factory.mktemp("run")
    tokenizer = AutoTokenizer.from_pretrained(MODEL)
    model = tiny_model("qwen3_moe", vocab_size=len(tokenizer), **WIDE)
    model.bfloat16().save_pretrained(folder / "model")
    tokenizer.save_pretrained(folder / "model")
    text = ("-c", CALIBRATION, "--samples", 16, "--length", 64, "--heldout", HELDOUT)
    with pytest.raises(SystemExit, match="0"):
        main([str(a) for a in (
            "prune", folder / "model", *text, "--heldout-samples", 16, "--experts", 7,
            "--method", "reap+scale", "--save-as", "fp8", "-o", folder / "out",
        )])  # fmt: skip
    return folder


def test_one_command(whole_run: Path) -> None:
    out = whole_run / "out"
    losses = json.loads((out / "moe_fair" / "heldout.json").read_text())
    assert losses["pruned"] != losses["original"]
    found = verify(out, Checkpoint(str(whole_run / "model")))
    assert found.ok, found.wrong
    assert "packed ones are near it" in found.checks[-1].detail
    size = sum(t.bytes for t in Checkpoint(str(out)).tensors)
    assert (
        gather(out).plan.after.bytes == size < Plan.load(out / "moe_fair" / "plan.json").after.bytes
    )


@pytest.mark.parametrize("what", ["experts", "router", "config", "list"])
def test_a_converted_result_that_was_tampered_with(
    whole_run: Path, tmp_path: Path, what: str
) -> None:
    out = tmp_path / "out"
    shutil.copytree(whole_run / "out", out)
    stored, said = tensors_of(out), json.loads((out / "config.json").read_text())
    settings = said["quantization_config"]
    home = "model.layers.1.mlp"
    if what == "experts":
        for end in ("", "_scale_inv"):
            a, b = (f"{home}.experts.{e}.up_proj.weight{end}" for e in (0, 1))
            stored[a], stored[b] = stored[b], stored[a]
    elif what == "router":
        stored[f"{home}.gate.weight"] = stored[f"{home}.gate.weight"].flip(0)
    elif what == "config":
        settings["activation_scheme"] = "static"
    else:
        settings.pop("modules_to_not_convert")
    rewrite(out, stored, settings)
    found = verify(out, Checkpoint(str(whole_run / "model")), hashes=False)
    wrong = {c.name: c.detail for c in found.checks if c.ok is False and c.name != "files"}
    expected = {
        "experts": ("experts", "is far from"), "router": ("experts", "differs from"),
        "config": ("config", "is not that of fp8"), "list": ("config", "no list of"),
    }[what]  # fmt: skip
    assert expected[1] in wrong[expected[0]]


def _refused(folder: Path, name: str, said: str) -> None:
    with pytest.raises(ValueError, match=said) as e:
        Conversion(Checkpoint(str(folder)), name)
    assert "\n" not in str(e.value)
    assert f"--save-as {name}" in str(e.value)


def test_what_cannot_be_is_told_in_a_line(tmp_path: Path) -> None:
    tiny_model("qwen3_moe").save_pretrained(tmp_path / "small")
    _refused(tmp_path / "small", "fp8", r"down_proj.weight is \[64, 32\], which 128 does not")
    tiny_model("qwen3_moe").bfloat16().save_pretrained(tmp_path / "bf16")
    _refused(tmp_path / "bf16", "bf16", "bfloat16 already")
    fp8(tmp_path / "fp8")
    _refused(tmp_path / "fp8", "fp8", "packed as fp8 already")
    mxfp4(tmp_path / "mxfp4")
    _refused(tmp_path / "mxfp4", "fp8", "no matrix of one expert")
    source = Checkpoint(str(tmp_path / "fp8"))
    with pytest.raises(ValueError, match=r"--size 1GB counts bytes .* --size 8B"):
        _conversion(Recipe(size="1GB", save_as="bf16"), source)
    with pytest.raises(ValueError, match="none of bf16, fp8, w4a16"):
        Recipe(save_as="nvfp4")


def test_four_bits_want_the_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = _written(tmp_path / "model", "qwen3_moe")
    for name in ("compressed_tensors", "compressed_tensors.quantization"):
        monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(ValueError, match=r"pip install 'moe_fair\[packed\]'"):
        Conversion(source, "w4a16")


def test_a_scale_that_is_no_number_is_told_while_it_is_written(tmp_path: Path) -> None:
    """Those that were not looked at before, of which there are more than two gigabytes."""
    fp8(tmp_path / "model")
    stored = tensors_of(tmp_path / "model")
    source = Checkpoint(str(tmp_path / "model"))
    kept = kept_experts(source, True)
    conversion = Conversion(source, "bf16")
    name = f"model.layers.1.mlp.experts.{kept['model.layers.1.mlp'][0]}.up_proj.weight_scale_inv"
    stored[name].view(-1)[:1] = torch.nan
    settings = source.published["quantization_config"]
    rewrite(tmp_path / "model", stored, settings)
    with pytest.raises(ValueError, match="no finite number"):
        write_model(source, kept, tmp_path / "out", conversion=conversion)


def test_nothing_but_one_weight_is_in_memory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each is packed when its bytes are asked for, once, and then forgotten."""
    source = _written(tmp_path / "model", "qwen3_moe")
    kept = kept_experts(source, True)
    conversion = Conversion(source, "fp8")
    calls: list[str] = []
    pack = Conversion.pack

    def counted(self: Any, weight: Any, values: Tensor) -> Any:
        calls.append(weight.parts[CODES].name)
        return pack(self, weight, values)

    monkeypatch.setattr(Conversion, "pack", counted)
    tensors = Repacking(source, kept, conversion).all_converted(source.tensors)
    assert list(tensors)
    assert not calls
    write_model(source, kept, tmp_path / "out", conversion=conversion)
    result = Checkpoint(str(tmp_path / "out"))
    assert result.packing is not None
    assert sorted(calls) == sorted(result.packing.weights)


def test_int4_is_written_as_llm_compressor_does(tmp_path: Path) -> None:
    """The same parts, types and settings as in what that package's own code writes."""
    compressed(tmp_path / "theirs", "W4A16")
    source = _written(tmp_path / "model", "qwen3_moe")
    kept = kept_experts(source, True)
    write_model(source, kept, tmp_path / "out", conversion=Conversion(source, "w4a16"))
    ends: list[dict[str, torch.dtype]] = []
    for folder in ("theirs", "out"):
        stored = tensors_of(tmp_path / folder)
        expert = "model.layers.1.mlp.experts.0.up_proj."
        ends.append({n.removeprefix(expert): t.dtype for n, t in stored.items() if expert in n})
    assert ends[0] == ends[1]
