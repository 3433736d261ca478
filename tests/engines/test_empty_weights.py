"""Models of which one layer alone is larger than any memory."""

from __future__ import annotations

from pathlib import Path

import torch
from tiny import tiny_model

from moe_fair.engines.empty_weights import without_weights
from moe_fair.engines.layers import LayeredModel


def test_a_layer_larger_than_any_memory_is_not_allocated(tmp_path: Path) -> None:
    model = tiny_model("qwen3_moe")
    model.save_pretrained(tmp_path)
    config = model.config
    config.moe_intermediate_size = 2**40
    layered = LayeredModel(
        tmp_path, config, dtype=torch.float32, device=torch.device("cpu"), tensors={}
    )
    assert all(p.is_meta for p in layered.model.parameters())
    assert not any(b.is_meta for b in layered.model.buffers())


def test_what_is_small_is_as_it_was() -> None:
    with without_weights():
        empties = [torch.empty(3, 2), torch.empty((3, 2)), torch.empty(size=(3, 2))]
        large = [torch.empty(2**20, 2**20), torch.empty((2**40,), dtype=torch.int8)]
    assert not any(t.is_meta for t in empties)
    assert all(t.is_meta for t in large)
