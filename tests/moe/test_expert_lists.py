"""Names of single experts in a config follow the cut."""

from __future__ import annotations

import pytest
from tiny import tiny_model

from moe_fair.moe.blocks import find_blocks
from moe_fair.moe.expert_lists import renumbered
from moe_fair.moe.tensor_slicing import ExpertTensor

BLOCK = "model.layers.1.mlp"


@pytest.fixture(scope="module")
def blocks() -> list:
    return find_blocks(tiny_model("qwen3_moe", num_hidden_layers=3))


KEPT = {BLOCK: [0, 3, 7, 11]}


@pytest.mark.parametrize(
    ("before", "after"),
    [
        (f"{BLOCK}.experts.3.down_proj", f"{BLOCK}.experts.1.down_proj"),
        (f"{BLOCK}.experts.11", f"{BLOCK}.experts.3"),
        (f"{BLOCK}.experts.4.down_proj", None),
        (f"language_model.{BLOCK}.experts.7.up_proj", f"language_model.{BLOCK}.experts.2.up_proj"),
        (
            r"re:^model\.layers\.1\.mlp\.experts\.7\..*",
            r"re:^model\.layers\.1\.mlp\.experts\.2\..*",
        ),
        (r"re:.*\.layers\.1\.mlp\.experts\.8\..*", None),
        ("model.layers.2.mlp.experts.5.down_proj", "model.layers.2.mlp.experts.5.down_proj"),
        (f"{BLOCK}.gate", f"{BLOCK}.gate"),
        ("lm_head", "lm_head"),
        (f"{BLOCK}.shared_experts.3", f"{BLOCK}.shared_experts.3"),
    ],
)
def test_names_in_lists_and_keys(blocks: list, before: str, after: str | None) -> None:
    config = {"quantization_config": {"ignore": [before, "x"], "layers": {before: {"bits": 8}}}}
    found = renumbered(config, {}, blocks, KEPT)["quantization_config"]
    assert found["ignore"] == ([after, "x"] if after else ["x"])
    assert found["layers"] == ({after: {"bits": 8}} if after else {})


def test_names_as_the_checkpoint_has_them(blocks: list) -> None:
    stored = "model.layers.1.block_sparse_moe.experts.{}.w1.weight"
    parts = {stored.format(e): ExpertTensor(BLOCK, e, 0, 12) for e in range(12)}
    config = {"ignore": [stored.format(7).removesuffix(".weight")]}
    found = renumbered(config, parts, blocks, KEPT)
    assert found == {"ignore": ["model.layers.1.block_sparse_moe.experts.2.w1"]}


def test_counts_that_are_repeated_and_entries_for_each_expert(blocks: list) -> None:
    kept = {b.name: list(range(8 - i)) for i, b in enumerate(blocks)}
    config = {
        "moe_capacity": [12, 12, 1], "expert_scale": [0.5] * 12, "expert_ids": list(range(12)),
        "moe_topk": [4, 4, 4], "layer_types": ["a"] * 12,
    }  # fmt: skip
    assert renumbered(config, {}, blocks, kept) == {
        "moe_capacity": [8, 8, 1], "expert_scale": [0.5] * 8, "expert_ids": list(range(12)),
        "moe_topk": [4, 4, 4], "layer_types": ["a"] * 12,
    }  # fmt: skip
