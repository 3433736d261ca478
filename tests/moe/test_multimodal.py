"""Multimodal models: the language model is pruned, what sees stays byte for byte as it was."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from flow import (
    check_counterfactual,
    check_cut,
    check_generation,
    check_naive,
    check_streaming,
    kept_experts,
    original,
)
from masking import masked
from places import RECORD, streamed
from safetensors.torch import load_file
from tiny import tiny_model
from transformers.models.auto.modeling_auto import MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES

from moe_fair.moe.checkpoint_source import Checkpoint

QUICK = "qwen3_vl_moe"
KINDS = [
    pytest.param(kind, marks=() if kind == QUICK else pytest.mark.slow)
    for kind in RECORD["multimodal"]
    if kind != "llama4"  # see families/test_llama4.py
    and kind in MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES
]


@pytest.fixture(scope="module", params=KINDS)
def checkpoint(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Any:
    return _saved(request.param, tmp_path_factory.mktemp(request.param))


def _saved(kind: str, folder: Path, **extra: Any) -> Checkpoint:
    name = MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES[kind]
    model = tiny_model(kind, architectures=[name], **extra)
    assert type(model).__name__ == name
    model.save_pretrained(folder)
    return Checkpoint(str(folder))


@pytest.mark.slow
def test_streaming_statistics_are_the_resident_ones(checkpoint: Checkpoint) -> None:
    if not streamed(checkpoint.config.model_type):
        with pytest.raises(ValueError, match="hands the next more than hidden states"):
            check_streaming(checkpoint)
    else:
        check_streaming(checkpoint)


@pytest.mark.slow
@pytest.mark.nightly
def test_statistics_equal_a_naive_loop(checkpoint: Checkpoint) -> None:
    check_naive(checkpoint, "grouped_mm")


@pytest.mark.slow
@pytest.mark.nightly
def test_without_each_expert(checkpoint: Checkpoint) -> None:
    check_counterfactual(checkpoint)


@pytest.mark.parametrize(
    "uniform", [pytest.param(True, marks=pytest.mark.nightly), False], ids=["uniform", "unequal"]
)
def test_cut_saved_and_loaded(checkpoint: Checkpoint, tmp_path: Path, uniform: bool) -> None:
    loaded = check_cut(checkpoint, tmp_path / "out", uniform)
    stock = type(checkpoint.skeleton)
    assert (type(loaded) is stock) if uniform else isinstance(loaded, stock)
    check_generation(loaded)
    before, after = _weights(checkpoint.path), _weights(tmp_path / "out")
    untouched = before.keys() - checkpoint.parts.keys()
    assert any("vis" in name for name in untouched)
    for name in untouched:
        a, b = (t[name].flatten().view(torch.uint8) for t in (before, after))
        assert torch.equal(a, b), name


def _weights(folder: Path) -> dict[str, torch.Tensor]:
    return {n: t for f in folder.glob("*.safetensors") for n, t in load_file(f).items()}


def test_an_image_is_seen_as_by_the_original_without_these_experts(tmp_path: Path) -> None:
    checkpoint = _saved(QUICK, tmp_path / "in", image_token_id=100)
    loaded = check_cut(checkpoint, tmp_path / "out", uniform=False)
    config = checkpoint.config
    vision = config.vision_config
    grid = torch.tensor([[1, 4, 4]])
    patch = vision.in_channels * vision.temporal_patch_size * vision.patch_size**2
    tokens = 16 // vision.spatial_merge_size**2
    ids = torch.tensor([[5, 6, *[config.image_token_id] * tokens, 7, 8, 9]])
    kinds = (ids == config.image_token_id).int()
    generator = torch.Generator().manual_seed(0)
    given = {
        "input_ids": ids,
        "attention_mask": torch.ones_like(ids),
        "mm_token_type_ids": kinds,
        "pixel_values": torch.randn(16, patch, generator=generator),
        "image_grid_thw": grid,
    }
    whole = original(checkpoint)
    with torch.no_grad():
        got = loaded(**given).logits
        blind = loaded(**given | {"pixel_values": -given["pixel_values"]}).logits
        with masked(whole, kept_experts(checkpoint, uniform=False)):
            want = whole(**given).logits
    assert (got - want).abs().max() <= 2e-5 * want.abs().max().clamp(min=1)
    assert (got - blind).abs().max() > 1e-3
