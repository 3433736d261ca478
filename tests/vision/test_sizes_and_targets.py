"""Costs against the cut model and PyTorch's own counter; targets met with the fewest units."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode
from vision.architectures import images, lively

from moe_fair.core.units import Scores
from moe_fair.vision.graph import Graph, logits
from moe_fair.vision.plan import Goal, Rules, make
from moe_fair.vision.proof import find_groups, uneven_plan
from moe_fair.vision.size import Sizes
from moe_fair.vision.surgery import cut, cuts_of

NAMES = ["resnet20", "densenet40", "regnet_y", "convnext", "vit"]


def parameters(model: nn.Module) -> int:
    return sum(p.numel() for p in model.parameters())


@pytest.mark.parametrize("name", NAMES)
def test_predicted_costs_are_those_of_the_cut_model(name: str) -> None:
    model = lively(name)
    graph = find_groups(model, images(2))
    sizes = Sizes(model, graph.groups, images(2))
    kept = uneven_plan(graph.groups, seed=2)
    predicted = sizes.at({n: len(ids) for n, ids in kept.items()})
    assert sizes.whole.parameters == parameters(model)
    cut(model, cuts_of(graph.groups, kept))
    assert predicted.parameters == parameters(model) < sizes.whole.parameters
    assert predicted == Sizes(model, (), images(2)).whole


@pytest.mark.parametrize("name", ["resnet20", "densenet40", "regnet_x"])
def test_multiply_adds_are_those_that_torch_counts(name: str) -> None:
    model = lively(name)
    counter = FlopCounterMode(display=False)
    with counter, torch.no_grad():
        logits(model, images(1))
    assert 2 * Sizes(model, (), images(1)).whole.operations == counter.get_total_flops()


@pytest.fixture(scope="module")
def problem() -> tuple[Graph, Sizes, Scores, Scores]:
    model = lively("resnet20")
    graph = find_groups(model, images(2))
    generator = torch.Generator().manual_seed(0)
    u, r = (
        Scores(n, {g.name: torch.rand(g.size, generator=generator).double() for g in graph.units})
        for n in ("u", "r")
    )
    return graph, Sizes(model, graph.groups, images(2)), u, r


@pytest.mark.parametrize("allocate", ["tod", "uniform", "global", "global-normalised"])
@pytest.mark.parametrize("what", ["operations", "parameters"])
def test_a_share_is_met_with_the_fewest_units_removed(
    problem: tuple[Graph, Sizes, Scores, Scores], allocate: str, what: str
) -> None:
    graph, sizes, u, r = problem
    limit = int(getattr(sizes.whole, what) * 0.6)
    plan = make(
        graph.groups, u, r, sizes, rules=Rules(allocate), goal=Goal(**{what: limit})
    )  # fmt: skip
    counts = {g.name: len(g.kept) for g in plan.groups}
    assert getattr(sizes.at(counts), what) <= limit
    one_more = make(
        graph.groups, u, r, sizes, rules=Rules(allocate), goal=Goal(units=sum(counts.values()) + 1)
    )
    more = {g.name: len(g.kept) for g in one_more.groups}
    assert sum(more.values()) == sum(counts.values()) + 1
    assert getattr(sizes.at(more), what) > limit


def test_a_ratio_is_met_exactly_and_cut(problem: tuple[Graph, Sizes, Scores, Scores]) -> None:
    graph, sizes, u, r = problem
    total = sum(g.size for g in graph.units)
    plan = make(graph.groups, u, r, sizes, rules=Rules("tod"), goal=Goal(units=total // 2))
    assert sum(len(g.kept) for g in plan.groups) == total // 2
    for g in plan.groups:  # the lowest removal scores left
        order = torch.argsort(u.values[g.name]).tolist()
        assert set(g.kept) == set(order[g.depth :])
    model = lively("resnet20")
    cut(model, cuts_of(graph.groups, plan.kept))
    assert parameters(model) == plan.after.parameters


def test_align_gives_multiples_and_leaves_smaller_groups_whole() -> None:
    model = lively("densenet40")  # 36 layers of 4 channels, transitions of 40 to 100
    graph = find_groups(model, images(2))
    sizes = Sizes(model, graph.groups, images(2))
    scores = Scores("u", {g.name: torch.arange(g.size).double() for g in graph.units})
    goal = Goal(operations=int(sizes.whole.operations * 0.9))
    plan = make(graph.groups, scores, None, sizes, rules=Rules("uniform", align=8), goal=goal)
    assert plan.explanation["operations_after"] <= goal.operations
    for g in plan.groups:
        assert len(g.kept) % 8 == 0 or (g.size < 8 and len(g.kept) == g.size)
    assert any(g.depth for g in plan.groups)


def test_floors_hold_and_what_is_out_of_reach_says_how_far_it_goes(
    problem: tuple[Graph, Sizes, Scores, Scores],
) -> None:
    graph, sizes, u, r = problem
    rules = Rules("tod", min_units=5)
    total = sum(min(5, g.size) for g in graph.units)
    plan = make(graph.groups, u, r, sizes, rules=rules, goal=Goal(units=total))
    assert all(len(g.kept) == min(5, g.size) for g in plan.groups)
    with pytest.raises(ValueError, match=f"out of reach.*{total} units"):
        make(graph.groups, u, r, sizes, rules=rules, goal=Goal(units=total - 1))


def test_tolerance_needs_no_budget(problem: tuple[Graph, Sizes, Scores, Scores]) -> None:
    graph, sizes, u, r = problem
    strict, loose = (
        make(graph.groups, u, r, sizes, rules=Rules("tod"), goal=Goal(tolerance=a))
        for a in (0.1, 0.5)
    )
    assert all(g.tod is not None and g.tod <= 0.1 for g in strict.groups)
    depths = [sum(g.depth for g in p.groups) for p in (strict, loose)]
    assert depths[0] < depths[1]


def test_the_order_of_cuts_does_not_matter() -> None:
    model = lively("regnet_y")
    graph = find_groups(model, images(2))
    cuts = cuts_of(graph.groups, uneven_plan(graph.groups))
    other = copy.deepcopy(model)
    cut(model, cuts)
    cut(other, cuts[::-1])
    assert all(
        torch.equal(a, b)
        for a, b in zip(model.state_dict().values(), other.state_dict().values(), strict=True)
    )


def test_shares_are_what_a_groups_layers_hold() -> None:
    """A convolution's own weights and the next one's that read it, counted by hand."""
    net = nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1), nn.ReLU(), nn.Conv2d(8, 4, 3, padding=1), nn.ReLU(),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 5),
    ).eval()  # fmt: skip
    x = torch.rand(2, 3, 6, 6)
    first, second, head = 3 * 8 * 9 + 8, 8 * 4 * 9 + 4, 4 * 5 + 5
    places = 36
    operations = places * (3 * 8 * 9 + 8 * 4 * 9) + 4 * 5
    graph = find_groups(net, x)
    found = Sizes(net, graph.groups, x).shares()
    assert [g.name for g in graph.groups] == ["0", "2"]
    whole = first + second + head
    assert found["0"] == pytest.approx(
        ((first + 8 * 4 * 9) / whole, places * (3 * 8 * 9 + 8 * 4 * 9) / operations)
    )
    assert found["2"] == pytest.approx(
        ((second + 4 * 5) / whole, (places * 8 * 4 * 9 + 4 * 5) / operations)
    )
