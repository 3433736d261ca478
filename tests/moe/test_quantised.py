"""Packed checkpoints: scored unpacked, cut packed; or refused before anything is loaded."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from flow import batches, collect, kept_experts
from masking import masked
from safetensors.torch import load_file, save_file
from tiny import tiny_model
from torch import Tensor

from moe_fair.core.recipe import Recipe
from moe_fair.engines.resident import ResidentEngine
from moe_fair.moe.checkpoint_source import Checkpoint
from moe_fair.moe.checkpoint_writer import write_model
from moe_fair.moe.surgery import cut
from moe_fair.pipelines.moe import open_model

# e2m1: sign, two bits of exponent, one of mantissa
FP4 = torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4, 6, -0.0, -0.5, -1, -1.5, -2, -3, -4, -6])


def _repack(folder: Path, settings: dict[str, Any], pack: Callable[..., dict[str, Tensor]]) -> None:
    """Put packed tensors in the place of those that `pack` wants to replace."""
    [file] = folder.glob("*.safetensors")
    stored: dict[str, Tensor] = {}
    for name, t in load_file(file).items():
        stored |= pack(name, t)
    save_file(stored, file, metadata={"format": "pt"})
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"] = settings
    (folder / "config.json").write_text(json.dumps(config))


def mxfp4(folder: Path) -> Callable[[str, Tensor], Tensor | None]:
    """gpt-oss as OpenAI ships it: random nibbles and powers of two."""
    tiny_model("gpt_oss").save_pretrained(folder)
    generator = torch.Generator().manual_seed(0)
    unpacked: dict[str, Tensor] = {}

    def pack(name: str, t: Tensor) -> dict[str, Tensor]:
        if not name.endswith(("gate_up_proj", "down_proj")) or "experts" not in name:
            return {name: t.to(torch.bfloat16)}
        e, width, rows = t.shape  # the model holds them transposed
        blocks = torch.randint(256, (e, rows, width // 32, 16), generator=generator).byte()
        scales = torch.randint(120, 124, (e, rows, width // 32), generator=generator).byte()
        values = torch.stack([FP4[(blocks & 15).long()], FP4[(blocks >> 4).long()]], -1)
        values = values.flatten(-2) * 2.0 ** (scales.float() - 127).unsqueeze(-1)
        unpacked[name] = values.flatten(-2).transpose(1, 2)
        return {f"{name}_blocks": blocks, f"{name}_scales": scales}

    skip = [
        "model.layers.*.self_attn",
        "model.layers.*.mlp.router",
        "model.embed_tokens",
        "lm_head",
    ]
    _repack(folder, {"quant_method": "mxfp4", "modules_to_not_convert": skip}, pack)
    return unpacked.get


def fp8(folder: Path) -> Callable[[str, Tensor], Tensor | None]:
    """One expert's matrix a tensor, with a scale for every 16 × 16 of it."""
    tiny_model("qwen3_moe").save_pretrained(folder)
    matrices: dict[str, Tensor] = {}

    def pack(name: str, t: Tensor) -> dict[str, Tensor]:
        if ".experts." not in name:
            return {name: t.to(torch.bfloat16)}
        r, c = (s // 16 for s in t.shape)
        tiles = t.view(r, 16, c, 16)
        scale = tiles.abs().amax((1, 3)) / 448
        packed = (tiles / scale[:, None, :, None]).to(torch.float8_e4m3fn)
        matrices[name] = (packed.float() * scale[:, None, :, None]).view_as(t)
        return {name: packed.view_as(t), f"{name}_scale_inv": scale}

    skip = ["lm_head", "embed_tokens", "self_attn", "gate"]
    settings = {
        "quant_method": "fp8", "weight_block_size": [16, 16], "activation_scheme": "dynamic",
        "modules_to_not_convert": skip,
    }  # fmt: skip
    _repack(folder, settings, pack)

    def unpacked(name: str) -> Tensor | None:
        home, _, kind = name.rpartition(".")
        if not home.endswith("experts"):
            return None
        parts = ["gate_proj", "up_proj"] if kind == "gate_up_proj" else [kind]
        return torch.stack(
            [torch.cat([matrices[f"{home}.{e}.{p}.weight"] for p in parts]) for e in range(12)]
        )

    return unpacked


@pytest.fixture(scope="module", params=[mxfp4, fp8], ids=["mxfp4", "fp8"])
def packed(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Any:
    folder = tmp_path_factory.mktemp("packed")
    unpacked = request.param(folder)
    return open_model(Recipe(model=str(folder), length=64)), unpacked


def test_scored_with_the_weights_that_the_bytes_stand_for(packed: Any) -> None:
    source, unpacked = packed
    model = source.load("float32", "cpu")
    seen = 0
    for name, p in model.named_parameters():
        want = unpacked(name)
        if want is not None:
            assert torch.allclose(p, want, rtol=2**-7, atol=0), name  # bfloat16 in between
            seen += 1
    assert seen == 2 * len(source.blocks)
    statistics = collect(source, model, ResidentEngine(model))
    assert all(statistics.rows[g.name].abs().sum() > 0 for g in source.groups)


@pytest.mark.parametrize("uniform", [True, False], ids=["uniform", "unequal"])
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


def test_streaming_is_refused(packed: Any) -> None:
    source, _ = packed
    with pytest.raises(ValueError, match="cannot be streamed"):
        open_model(Recipe(model=str(source.path), length=64, engine="streaming"))


@pytest.mark.parametrize("how", ["gptq", "awq", "compressed-tensors", "bitsandbytes", "modelopt"])
def test_other_packings_are_refused_before_anything_is_loaded(how: str, tmp_path: Path) -> None:
    tiny_model("qwen3_moe").save_pretrained(tmp_path)
    _repack(tmp_path, {"quant_method": how}, lambda name, t: {name: t})
    with pytest.raises(ValueError, match=rf"quantised \({how}\) and cannot be scored: only mxfp4"):
        open_model(Recipe(model=str(tmp_path), length=64))


def test_experts_under_unknown_names_are_not_passed_over(tmp_path: Path) -> None:
    tiny_model("qwen3_moe").save_pretrained(tmp_path)
    _repack(tmp_path, {}, lambda name, t: {name.replace("_proj.weight", "_proj.weight_2"): t})
    with pytest.raises(ValueError, match="none of its experts' tensors was found"):
        open_model(Recipe(model=str(tmp_path), length=64))
