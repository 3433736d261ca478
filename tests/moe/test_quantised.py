"""Packed checkpoints: scored unpacked, whole or streamed, and cut packed; or refused in a line."""

from __future__ import annotations

import json
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from flow import batches, collect, kept_experts
from masking import masked
from packing import SCHEMES, Stored, compressed, fp8, plain_copy, rewrite, tensors_of
from safetensors.torch import save_file
from tiny import tiny_model
from torch import Tensor
from transformers import CompressedTensorsConfig, FineGrainedFP8Config, Mxfp4Config

from moe_fair.core.recipe import Recipe
from moe_fair.core.units import Statistics
from moe_fair.engines.auto import auto_class
from moe_fair.engines.layers import LayeredModel
from moe_fair.engines.processes import ALONE
from moe_fair.engines.reading import Reader, SharedReader
from moe_fair.engines.stored_values import read_tensor
from moe_fair.engines.streaming import StreamingEngine
from moe_fair.moe.checkpoint_source import Checkpoint
from moe_fair.moe.checkpoint_writer import write_model
from moe_fair.moe.engine_choice import start
from moe_fair.moe.surgery import cut
from moe_fair.pipelines.moe import open_model

pytestmark = pytest.mark.slow  # whole runs, by and large

# how transformers unpacks it on load, where it does
THEIRS = {
    "mxfp4": Mxfp4Config, "fp8": FineGrainedFP8Config,
    "compressed-tensors": CompressedTensorsConfig,
}  # fmt: skip
# zero points; a scale that is not one a row; a scale of the whole; squares that are cut off
NOT_THEIRS = {"W4A16_ASYM", "W8A8", "FP8_BLOCK", "NVFP4A16", "fp8, squares cut off"}
QUICK = ("fp8", "W4A16")  # of the schemes; every other one is tried in whole runs
# of a scheme that is there with other numbers; test_repacking.py has these by day, too
BY_NIGHT = ("GPTQ, 8 bits", "GPTQ, 2 bits", "W8A16", "ModelOpt FP8 of rows")


def _marks(scheme: str) -> list[pytest.MarkDecorator]:
    slow = [] if scheme in QUICK else [pytest.mark.slow]
    return [*slow, pytest.mark.nightly] if scheme in BY_NIGHT else slow


PARAMS = [pytest.param(n, marks=_marks(n)) for n in SCHEMES]


@pytest.fixture(scope="module", params=PARAMS)
def packed(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """A packed checkpoint, and the same unpacked."""
    folder = tmp_path_factory.mktemp("packed") / request.param / "model"
    folder.parent.mkdir()
    plain = SCHEMES[request.param](folder)
    other = plain_copy(folder, folder.parent / "plain", plain)
    return open_model(Recipe(model=str(folder), length=64)), Checkpoint(str(other))


def _statistics(source: Checkpoint, engine: str) -> Statistics:
    found, model = start(source, engine, "float32", "cpu", _all)
    if isinstance(found, StreamingEngine):
        found.device_bytes = 20_000
    return collect(source, model, found)


def _all(_: str, __: int | None, batches: Any) -> Any:
    return iter(batches)


def _same(a: Statistics, b: Statistics) -> None:
    for group in a.groups:
        assert a.rows[group.name].abs().sum() > 0
        assert torch.equal(a.rows[group.name], b.rows[group.name])
        for name, value in a.sums[group.name].items():
            assert torch.equal(value, b.sums[group.name][name]), (group.name, name)


def test_scored_with_the_weights_that_the_bytes_stand_for(packed: Any) -> None:
    source, plain = packed
    wanted = _statistics(plain, "resident")
    _same(wanted, _statistics(source, "resident"))
    _same(wanted, _statistics(source, "streaming"))
    assert source.size.parameters == plain.size.parameters


def test_unpacked_as_transformers_does(packed: Any, tmp_path: Path) -> None:
    """Before the cut and after it."""
    source, _ = packed
    if source.path.parent.name in NOT_THEIRS or source.scheme.name not in THEIRS:
        pytest.skip("transformers 5.23 does not unpack these experts, or not with every scale")
    write_model(source, kept_experts(source, True), tmp_path / "out")
    for found in (source, Checkpoint(str(tmp_path / "out"))):
        stored = dict(found.published["quantization_config"])
        stored = stored if source.scheme.name == "compressed-tensors" else {}
        settings = THEIRS[source.scheme.name](**stored, dequantize=True)
        with warnings.catch_warnings():  # that there are two settings
            warnings.simplefilter("ignore", UserWarning)
            theirs = auto_class(source.config).from_pretrained(
                found.path, dtype=torch.bfloat16, quantization_config=settings
            )
        a, b = found.load("bfloat16", "cpu").state_dict(), theirs.state_dict()
        assert a.keys() == b.keys()
        for name, t in a.items():
            # theirs of a scale in two steps of bfloat16
            assert torch.allclose(t.float(), b[name].float(), rtol=2**-6, atol=0), name


@pytest.mark.parametrize(
    "uniform", [pytest.param(True, marks=pytest.mark.nightly), False], ids=["uniform", "unequal"]
)
def test_cut_in_packed_form(packed: Any, tmp_path: Path, uniform: bool) -> None:
    source, _ = packed
    kept = kept_experts(source, uniform)
    write_model(source, kept, tmp_path / "out")
    result = Checkpoint(str(tmp_path / "out"))
    assert result.size == source.size.without(
        source.groups, {n: len(ids) for n, ids in kept.items()}
    )
    assert {t.dtype for t in result.tensors} == {t.dtype for t in source.tensors}
    loaded = result.load("float32", "cpu").eval()
    reference = source.load("float32", "cpu").eval()
    cut(reference, kept)
    a, b = reference.state_dict(), loaded.state_dict()
    assert a.keys() == b.keys()
    assert all(torch.equal(a[k], b[k]) for k in a)
    whole, batch = source.load("float32", "cpu").eval(), batches()[0]
    with torch.no_grad():
        logits = loaded(batch.input_ids, attention_mask=batch.mask).logits
        with masked(whole, kept):
            expected = whole(batch.input_ids, attention_mask=batch.mask).logits
    seen = batch.mask.bool()
    assert (logits - expected)[seen].abs().max() <= 2e-5 * expected.abs().max().clamp(min=1)


def test_every_byte_of_what_stays_is_the_originals(packed: Any, tmp_path: Path) -> None:
    source, _ = packed
    kept = kept_experts(source, False)
    write_model(source, kept, tmp_path / "out")
    found = tensors_of(tmp_path / "out")
    for t in source.tensors:
        part, whole = source.parts.get(t.name), read_tensor(t)
        if part is None:
            assert torch.equal(_bytes(found.pop(t.name)), _bytes(whole))
        elif part.expert is None:
            assert torch.equal(_bytes(found.pop(t.name)), _bytes(whole[kept[part.block]]))
        elif part.expert in kept[part.block]:
            number = kept[part.block].index(part.expert)
            name = t.name.replace(f".experts.{part.expert}.", f".experts.{number}.")
            assert torch.equal(_bytes(found.pop(name)), _bytes(whole))
    assert not found


def _bytes(t: Tensor) -> Tensor:
    return t.contiguous().flatten().view(torch.uint8)


@pytest.mark.parametrize("how", ["bitsandbytes", "quark", "hqq", "fbgemm_fp8"])
def test_other_packings_are_refused_before_anything_is_read(how: str, tmp_path: Path) -> None:
    tiny_model("qwen3_moe").save_pretrained(tmp_path)
    rewrite(tmp_path, tensors_of(tmp_path), {"quant_method": how})
    (tmp_path / "model.safetensors").unlink()
    with pytest.raises(ValueError, match=rf"quantised \({how}\) and cannot be scored: only fp8"):
        open_model(Recipe(model=str(tmp_path), length=64))


def test_experts_under_unknown_names_are_not_passed_over(tmp_path: Path) -> None:
    tiny_model("qwen3_moe").save_pretrained(tmp_path)
    stored = tensors_of(tmp_path)
    renamed = {n.replace("_proj.weight", "_proj.weight_2"): t for n, t in stored.items()}
    rewrite(tmp_path, renamed, None)
    with pytest.raises(ValueError, match="none of its experts' tensors was found"):
        open_model(Recipe(model=str(tmp_path), length=64))


EXPERT = "model.layers.1.mlp.experts.3.up_proj."


def _spoilt(folder: Path, change: Callable[[Stored], object]) -> None:
    """Change a checkpoint's tensors in place, and try to open it."""
    stored = tensors_of(folder)
    change(stored)
    save_file(stored, folder / "model.safetensors", metadata={"format": "pt"})
    open_model(Recipe(model=str(folder), length=64))


def _nan(name: str) -> Callable[[Stored], object]:
    def change(stored: Stored) -> None:
        stored[name].view(-1)[:1] = torch.nan

    return change


def _resized(name: str, *shape: int) -> Callable[[Stored], object]:
    def change(stored: Stored) -> None:
        stored[name] = torch.zeros(shape, dtype=stored[name].dtype)

    return change


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda s: s.pop(EXPERT + "weight_scale_inv"), "nothing lies beside it"),
        (lambda s: s.pop(EXPERT + "weight"), r"and .*up_proj.weight \(codes\) is missing"),
        (_nan(EXPERT + "weight_scale_inv"), "no finite number"),
        (_resized(EXPERT + "weight_scale_inv", 2, 3), r"\[2, 3\]; FP8 in squares .* \[2, 4\]"),
        (_resized(EXPERT + "weight_scale_inv", 0), "holds nothing"),
    ],
    ids=["no scale", "no codes", "not a number", "wrong shape", "empty"],
)
def test_corrupt_fp8_is_told(tmp_path: Path, change: Callable[[Stored], object], said: str) -> None:
    fp8(tmp_path)
    with pytest.raises(ValueError, match=said) as e:
        _spoilt(tmp_path, change)
    assert "\n" not in str(e.value)


@pytest.mark.parametrize(
    ("preset", "change", "said"),
    [
        ("W4A16", lambda s: s.pop(EXPERT + "weight_scale"), "weight_scale .scale. is missing"),
        ("W4A16", _nan(EXPERT + "weight_scale"), "no finite number"),
        ("W4A16", _resized(EXPERT + "weight_scale", 32, 3), "has no scale for every group"),
        ("W4A16_ASYM", lambda s: s.pop(EXPERT + "weight_zero_point"), "zero point. is missing"),
        ("NVFP4A16", lambda s: s.pop(EXPERT + "weight_global_scale"), "global scale. is missing"),
        ("FP8_DYNAMIC", _resized(EXPERT + "weight_scale", 31, 1), r"wants \[32, 1\]"),
        ("W4A16", lambda s: s.update({EXPERT + "weight_g_idx": torch.zeros(64).int()}), "order"),
    ],
)  # fmt: skip
def test_corrupt_compressed_tensors_are_told(
    tmp_path: Path, preset: str, change: Callable[[Stored], object], said: str
) -> None:
    compressed(tmp_path, preset)
    with pytest.raises(ValueError, match=said) as e:
        _spoilt(tmp_path, change)
    assert "\n" not in str(e.value)


def test_one_expert_of_eight_bits_among_those_of_four(tmp_path: Path) -> None:
    """A group of the config may be meant for a single expert: the budget counts on equal sizes."""
    compressed(tmp_path / "8", "W8A16")
    compressed(tmp_path / "4", "W4A16")
    stored, more = tensors_of(tmp_path / "4"), tensors_of(tmp_path / "8")
    stored |= {n: t for n, t in more.items() if n.startswith(EXPERT)}
    settings, wide = (
        json.loads((tmp_path / f / "config.json").read_text())["quantization_config"]
        for f in ("4", "8")
    )
    group = wide["config_groups"]["group_0"] | {"targets": [EXPERT.removesuffix(".")]}
    settings["config_groups"]["group_1"] = group
    rewrite(tmp_path / "4", stored, settings)
    with pytest.raises(ValueError, match=r"packed otherwise, are not of one size") as e:
        open_model(Recipe(model=str(tmp_path / "4"), length=64))
    assert "\n" not in str(e.value)


def test_layers_of_which_only_some_are_packed(tmp_path: Path) -> None:
    """As the first and last layers of published models are not."""
    plain = fp8(tmp_path / "model")
    stored = tensors_of(tmp_path / "model")
    first = "model.layers.0.mlp.experts."
    for name in [n for n in stored if n.startswith(first)]:
        if name.endswith("_scale_inv"):
            stored.pop(name)
        else:
            stored[name] = plain[name]
    settings = json.loads((tmp_path / "model" / "config.json").read_text())["quantization_config"]
    settings["modules_to_not_convert"].append("model.layers.0.mlp")
    rewrite(tmp_path / "model", stored, settings)
    source = open_model(Recipe(model=str(tmp_path / "model"), length=64))
    other = plain_copy(tmp_path / "model", tmp_path / "plain", plain)
    _same(_statistics(Checkpoint(str(other)), "resident"), _statistics(source, "streaming"))
    kept = kept_experts(source, False)
    write_model(source, kept, tmp_path / "out")
    found = Checkpoint(str(tmp_path / "out")).load("float32", "cpu").state_dict()
    reference = source.load("float32", "cpu")
    cut(reference, kept)
    assert all(torch.equal(t, found[n]) for n, t in reference.state_dict().items())


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"quant_method": "mxfp4"}, "contradict"),
        ({"quant_method": "fp8", "weight_block_size": [16, 32]}, "contradict"),
        ({"quant_method": "fp8", "weight_block_size": "16"}, "no two whole numbers"),
    ],
)
def test_a_config_that_the_tensors_contradict(
    tmp_path: Path, settings: dict[str, Any], said: str
) -> None:
    fp8(tmp_path)
    rewrite(tmp_path, tensors_of(tmp_path), settings)
    with pytest.raises(ValueError, match=said):
        open_model(Recipe(model=str(tmp_path), length=64))


@pytest.mark.parametrize("how", ["pack-quantized", "nvfp4-pack-quantized", "marlin-24"])
def test_compressed_tensors_that_the_config_calls_another_format(tmp_path: Path, how: str) -> None:
    compressed(tmp_path, "FP8_DYNAMIC")
    settings = json.loads((tmp_path / "config.json").read_text())["quantization_config"]
    settings["config_groups"]["group_0"]["format"] = how
    rewrite(tmp_path, tensors_of(tmp_path), settings)
    with pytest.raises(ValueError, match=r"contradict|not unpacked|cannot be read"):
        open_model(Recipe(model=str(tmp_path), length=64))


def test_layers_that_processes_share_are_unpacked_too(tmp_path: Path) -> None:
    fp8(tmp_path)
    source = Checkpoint(str(tmp_path))
    found = []
    for reader in (Reader(), SharedReader(ALONE)):
        layered = LayeredModel(
            source.path, source.config, dtype=torch.float32, device=torch.device("cpu"),
            packing=source.packing,
        )  # fmt: skip
        layered.reader = reader
        with layered.layer(1, 2) as layer:
            found.append({n: p.clone() for n, p in layer.named_parameters()})
    assert all(torch.equal(t, found[1][n]) for n, t in found[0].items())


def test_half_of_it_on_disk(tmp_path: Path) -> None:
    fp8(tmp_path / "model")
    source = Checkpoint(str(tmp_path / "model"))
    whole = source.load("float32", "cpu")
    places = tmp_path / "places.yaml"
    places.write_text('"": cpu\n"model.layers.2": disk\n"model.layers.3": disk\n')
    spread = source.load("float32", "cpu", str(places))
    ids = batches()[0].input_ids
    with torch.no_grad():
        assert torch.equal(whole(input_ids=ids).logits, spread(input_ids=ids).logits)


def test_what_is_to_be_installed_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tiny_model("qwen3_moe").save_pretrained(tmp_path)
    settings = {"quant_method": "compressed-tensors", "format": "pack-quantized"}
    rewrite(tmp_path, tensors_of(tmp_path), settings)
    for name in ("compressed_tensors", "compressed_tensors.quantization"):
        monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(ValueError, match=r"pip install 'moe_fair\[packed\]'"):
        open_model(Recipe(model=str(tmp_path), length=64))
