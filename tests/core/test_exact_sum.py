"""Sums in any order and grouping have the same bits, where plain addition has not."""

from __future__ import annotations

import math
import random

import torch
from torch import Tensor

from moe_fair.core.exact_sum import add_exactly, two_sum
from moe_fair.core.units import Statistics, UnitGroup

GROUP = UnitGroup("l0", 0, 64)


def shard(i: int, values: Tensor) -> Statistics:
    return Statistics(
        groups=(GROUP,),
        domains=("all",),
        sums={"l0": {"taylor": values[None]}},
        constants={},
        rows={"l0": values[None]},
        sequence_ids=torch.tensor([i]),
        sequence_domains=torch.tensor([0]),
        tokens=torch.ones(1, dtype=torch.float64),
        sequences=torch.ones(1, dtype=torch.float64),
    )


def terms(n: int) -> Tensor:
    """Signed, over twelve orders of magnitude: a sum of them cancels."""
    g = torch.Generator().manual_seed(0)
    size = torch.rand(n, 64, generator=g, dtype=torch.float64) * 12
    return torch.randn(n, 64, generator=g, dtype=torch.float64) * 10**size


def test_two_sum_loses_nothing() -> None:
    a, b = terms(2)
    total, lost = two_sum(a, b)
    for x, y, s, e in zip(a.tolist(), b.tolist(), total.tolist(), lost.tolist(), strict=True):
        assert s == x + y
        assert math.fsum([x, y, -s, -e]) == 0


def test_any_tree_of_merges_gives_the_correctly_rounded_sum() -> None:
    values = terms(41)
    expected = torch.tensor(
        [math.fsum(column) for column in values.T.tolist()], dtype=torch.float64
    )
    plain = set()
    for seed in range(5):
        order = random.Random(seed)
        parts = [shard(i, v) for i, v in enumerate(values)]
        plain.add(tuple(values[order.sample(range(41), 41)].cumsum(0)[-1].tolist()))
        while len(parts) > 1:
            a, b = (parts.pop(order.randrange(len(parts))) for _ in range(2))
            parts.append(a.merge(b))
        [merged] = parts
        rounded = merged.rounded()
        assert torch.equal(rounded.sums["l0"]["taylor"][0], expected)
        assert torch.equal(rounded.rows["l0"], values)
        assert not rounded.compensation
    assert len(plain) > 1  # order shows in plain addition


def test_many_are_added_as_each_is() -> None:
    g = torch.Generator().manual_seed(1)
    shapes = [(3,), (2, 4), ()]
    totals, lost, terms = (
        [torch.randn(s, generator=g, dtype=torch.float64) * 10**i for s in shapes] for i in range(3)
    )
    each = [two_sum(a, b) for a, b in zip(totals, terms, strict=True)]
    before = [t.clone() for t in lost]
    add_exactly(totals, lost, terms)
    for (total, error), b, now, left in zip(each, before, totals, lost, strict=True):
        assert torch.equal(now, total)
        assert torch.equal(left, b + error)
    add_exactly([], [], [])
