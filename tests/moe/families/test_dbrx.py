"""DBRX: experts in one 2-D matrix; everything that a family of the contract must pass."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from flow import (
    check_counterfactual,
    check_cut,
    check_generation,
    check_naive,
    check_streaming,
    check_trial,
)
from tiny import tiny_model
from torch import Tensor

from moe_fair.moe.checkpoint_source import Checkpoint


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    folder = tmp_path_factory.mktemp("dbrx")
    sizes = {
        "d_model": 64, "n_heads": 4, "n_layers": 3, "max_seq_len": 128,
        "attn_config": {"kv_n_heads": 2, "clip_qkv": 8.0, "rope_theta": 10000.0},
        "ffn_config": {"hidden_size": 64, "ffn_hidden_size": 32, "moe_num_experts": 12,
            "moe_top_k": 4, "moe_normalize_expert_weights": 1.0},
    }  # fmt: skip
    tiny_model("dbrx", **sizes).save_pretrained(folder)
    return Checkpoint(str(folder))


def expert(m: Any, e: int, x: Tensor, g: Tensor) -> Tensor:
    """f_e(x), whatever g, from expert e's F rows of each matrix."""
    rows = slice(e * m.ffn_hidden_size, (e + 1) * m.ffn_hidden_size)
    w1, v1, w2 = (getattr(m.mlp, name)[rows] for name in ("w1", "v1", "w2"))
    return (m.mlp.activation_fn(x @ w1.T) * (x @ v1.T)) @ w2


def test_streaming_statistics_are_the_resident_ones(checkpoint: Checkpoint) -> None:
    check_streaming(checkpoint)


def test_statistics_equal_a_naive_loop(checkpoint: Checkpoint) -> None:
    check_naive(checkpoint, None, expert)


@pytest.mark.slow
def test_without_each_expert(checkpoint: Checkpoint) -> None:
    check_counterfactual(checkpoint)


@pytest.mark.parametrize("uniform", [True, False], ids=["uniform", "unequal"])
def test_cut_saved_and_loaded(checkpoint: Checkpoint, tmp_path: Path, uniform: bool) -> None:
    check_generation(check_cut(checkpoint, tmp_path / "out", uniform), ())


def test_plans_are_tried(checkpoint: Checkpoint) -> None:
    check_trial(checkpoint)
