"""Models of which one layer alone is larger than any memory."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from tiny import fused_families, tiny_model
from transformers import PreTrainedModel

from moe_fair.engines.auto import auto_class
from moe_fair.engines.empty_weights import uninitialised, without_weights
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


QUICK = ("qwen2_moe", "deepseek_v3", "gpt_oss", "gemma4")
KINDS = [pytest.param(k, marks=[] if k in QUICK else [pytest.mark.nightly])
         for k in fused_families()]  # fmt: skip


@pytest.mark.parametrize("kind", KINDS)
def test_they_are_those_of_models_with_weights(kind: str) -> None:
    """Names, shapes and what is tied; buffers have the values that they are computed with."""
    config = tiny_model(kind).config
    config.tie_word_embeddings = kind == "qwen2_moe"

    def made() -> PreTrainedModel:
        return auto_class(config).from_config(config)

    full = made()
    with without_weights():
        empty = made()
    empty.tie_weights()  # as whoever fills it does: accelerate makes each parameter anew
    with torch.device("meta"), uninitialised():
        bare = made()
    after = made()
    for model in (empty, bare):
        assert {n: (p.shape, p.dtype) for n, p in model.named_parameters()} == {
            n: (p.shape, p.dtype) for n, p in full.named_parameters()
        }
        assert all(p.is_meta for p in model.parameters())
    computed = dict(empty.named_buffers())
    for name, buffer in full.named_buffers():
        assert torch.equal(computed[name], buffer), name
    # outside weights have values again: no two models the same
    assert any(
        not torch.equal(a, b) for a, b in zip(full.parameters(), after.parameters(), strict=True)
    )
