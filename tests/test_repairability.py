"""What repairs leave of an expert: closed forms against least squares solved as they are."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch
from flow import batches
from tiny import tiny_model
from torch import Tensor

from moe_fair.moe.blocks import find_blocks

sys.path.insert(0, str(Path(__file__).parent.parent / "eval"))
from repairability import Elimination, grams, greedily, threshold


def _layer(kind: str = "qwen2_moe") -> tuple[Tensor, Tensor]:
    """G and the down projections of a tiny model's last layer, in float64."""
    model = tiny_model(kind).double().eval()
    model.set_experts_implementation("eager")
    *_, (block, gram, w) = grams(model, batches())
    assert block.name == find_blocks(model)[-1].name
    return gram, w


def _residual(gram: Tensor, w: Tensor, gone: list[int], weight: float) -> float:
    """min ‖Φ_S W_S - Φ_R V‖² + λ‖V‖² by least squares on a square root of G and of λ."""
    size, width, depth = w.shape
    values, vectors = torch.linalg.eigh(gram)
    phi = (vectors * values.clamp(min=0).sqrt()).T  # Φ but for a rotation of its rows
    columns = torch.arange(size * width).view(size, width)
    out = columns[gone].flatten()
    stay = columns[[e for e in range(size) if e not in gone]].flatten()
    target = phi[:, out] @ w.double()[gone].flatten(0, 1)
    ridge = weight**0.5 * torch.eye(len(stay), dtype=torch.float64)
    a = torch.cat([phi[:, stay], ridge])
    b = torch.cat([target, target.new_zeros(len(stay), depth)])
    v = torch.linalg.lstsq(a, b).solution
    return float((b - a @ v).square().sum())


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["qwen2_moe", pytest.param("gpt_oss", marks=pytest.mark.nightly)])
def test_what_is_left_of_one_expert_is_the_residual_of_least_squares(kind: str) -> None:
    gram, w = _layer(kind)
    layer = Elimination(gram, w)
    adds = layer.adds()
    for e in range(len(w)):
        wanted = _residual(gram, w, [e], layer.weight)
        assert float(adds[e]) == pytest.approx(wanted, rel=1e-6, abs=1e-12)
        alone = slice(e * w.shape[1], (e + 1) * w.shape[1])
        raw = float(torch.trace(w[e].double().T @ gram[alone, alone] @ w[e].double()))
        assert float(layer.raw[e]) == pytest.approx(raw, rel=1e-9)
        assert -1e-9 <= float(adds[e]) <= raw * (1 + 1e-9)


@pytest.mark.slow
def test_experts_that_leave_one_by_one_cost_what_they_cost_together() -> None:
    gram, w = _layer()
    layer, gone = Elimination(gram, w), []
    for _ in range(6):
        adds = layer.adds()
        costs = {
            e: _residual(gram, w, [*gone, e], layer.weight) for e in range(len(w)) if e not in gone
        }
        e = int(adds.argmin())
        assert e == min(costs, key=costs.__getitem__)
        layer.leave(e)
        gone.append(e)
        assert layer.cost == pytest.approx(costs[e], rel=1e-6)
    assert sorted(layer.left + gone) == list(range(len(w)))


def test_sets_are_chosen_over_all_layers_down_to_the_floors() -> None:
    gram, w = _layer()
    layers = {"a": Elimination(gram, w), "b": Elimination(gram * 100, w)}
    scores = {"a": torch.ones(len(w)).double(), "b": torch.ones(len(w)).double() * 9}
    kept = greedily(layers, scores, {"a": 8, "b": 4}, 6)
    assert len(kept["a"]) == 8  # dearer by ninefold, and cut to its floor at most
    assert len(kept["b"]) == len(w) - 2
    cut = threshold(scores, {"a": 8, "b": 4}, 6)
    assert [len(k) for k in cut.values()] == [8, len(w) - 2]
