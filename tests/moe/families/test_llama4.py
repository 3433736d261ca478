"""Llama 4: the router weight on the input; everything that a family of the contract must pass."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from flow import (
    Calls,
    check_counterfactual,
    check_cut,
    check_generation,
    check_naive,
    check_streaming,
    check_trial,
)
from tiny import tiny_model
from torch import Tensor

from moe_fair.moe.blocks import find_blocks
from moe_fair.moe.checkpoint_source import Checkpoint


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    folder = tmp_path_factory.mktemp("llama4")
    sizes = {"intermediate_size_mlp": 48, "interleave_moe_layer_step": 2, "num_experts_per_tok": 2}
    tiny_model("llama4_text", **sizes).save_pretrained(folder)
    return Checkpoint(str(folder))


def expert(m: Any, e: int, x: Tensor, g: Tensor) -> Tensor:
    """mlp_e(g x) / g."""
    gate, up = (g * x @ m.gate_up_proj[e]).chunk(2, dim=-1)
    return (up * m.act_fn(gate)) @ m.down_proj[e] / g


@contextmanager
def recorded(model: Any) -> Iterator[Calls]:
    """The choice and the routed output, read off the stock block: all experts on all tokens."""
    calls: Calls = []
    given: dict[str, Any] = {}
    handles = []
    for b in find_blocks(model):

        def router(m: Any, args: Any, out: Any) -> None:
            given.update(x=args[0], scores=out[0])

        def experts(m: Any, args: Any, out: Tensor) -> None:
            scores = given["scores"]
            ids = (scores > 0).nonzero()[:, 1].view(len(scores), -1)
            y = out.view(m.num_experts, *given["x"].shape).sum(0)
            calls.append((m, given["x"], ids, scores.gather(1, ids), y))

        handles += [b.router.register_forward_hook(router)]
        handles += [b.experts.register_forward_hook(experts)]
    yield calls
    for h in handles:
        h.remove()


@pytest.mark.slow
def test_inside_the_multimodal_model(tmp_path: Path) -> None:
    name = "Llama4ForConditionalGeneration"
    model = tiny_model("llama4", architectures=[name])
    assert type(model).__name__ == name
    model.save_pretrained(tmp_path / "in")
    checkpoint = Checkpoint(str(tmp_path / "in"))
    check_streaming(checkpoint)
    check_naive(checkpoint, None, expert, recorded)
    loaded = check_cut(checkpoint, tmp_path / "out", uniform=False)
    assert type(loaded).__mro__[1] is type(model)
    assert loaded.config.vision_config.to_dict() == model.config.vision_config.to_dict()


def test_only_every_second_layer_has_experts(checkpoint: Checkpoint) -> None:
    assert [b.layer for b in checkpoint.blocks] == [1, 3]


def test_streaming_statistics_are_the_resident_ones(checkpoint: Checkpoint) -> None:
    check_streaming(checkpoint)


def test_statistics_equal_a_naive_loop(checkpoint: Checkpoint) -> None:
    check_naive(checkpoint, None, expert, recorded)


@pytest.mark.slow
def test_without_each_expert(checkpoint: Checkpoint) -> None:
    check_counterfactual(checkpoint, recorded)


@pytest.mark.parametrize("uniform", [True, False], ids=["uniform", "unequal"])
def test_cut_saved_and_loaded(checkpoint: Checkpoint, tmp_path: Path, uniform: bool) -> None:
    check_generation(check_cut(checkpoint, tmp_path / "out", uniform), ())


def test_plans_are_tried(checkpoint: Checkpoint) -> None:
    check_trial(checkpoint)
