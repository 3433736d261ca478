"""What calibration text covers, against loops over single experts, and how it is said."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from moe_fair.core.domain_weights import domain_weights
from moe_fair.core.plan import Plan, Target, make_plan
from moe_fair.core.plan_parts import ModelSize
from moe_fair.core.units import Statistics, UnitGroup
from moe_fair.moe.coverage import Coverage, coverage
from moe_fair.moe.criteria import criteria
from moe_fair.moe.statistics import statistics as known
from moe_fair.report.coverage import coverage_blocks, coverage_lines
from moe_fair.report.document import Table

DOMAINS, LAYERS, EXPERTS = ("a", "b", "c"), 3, 12
SIZE = ModelSize(10**6, 2 * 10**6)


def statistics(seed: int = 0, rows: int = 30) -> Statistics:
    draw = torch.Generator().manual_seed(seed)

    def random(*shape: int) -> torch.Tensor:
        return torch.rand(*shape, generator=draw, dtype=torch.float64)

    names = [f"layers.{i}.experts" for i in range(LAYERS)]
    groups = tuple(UnitGroup(n, i, EXPERTS, blocks=2) for i, n in enumerate(names))
    sums = {
        n: {"gate": random(3, EXPERTS), "norm": random(3, EXPERTS), "tokens": random(3, EXPERTS)}
        for n in names
    }
    ids = torch.randperm(rows, generator=draw)
    return Statistics(
        groups=groups, domains=DOMAINS, sums=sums, constants={},
        rows={n: random(rows, EXPERTS) - 0.5 for n in names} if rows else {},
        sequence_ids=ids, sequence_domains=ids % 3,
        tokens=torch.full((3,), 100.0, dtype=torch.float64),
        sequences=torch.full((3,), rows / 3, dtype=torch.float64),
    )  # fmt: skip


def planned(found: Statistics, name: str = "router-mass", keep: int = 8) -> Plan:
    scores = criteria()[name](found)
    target = Target(mean_kept=keep)
    return make_plan(found.groups, scores, None, target=target, allocator="uniform", before=SIZE)


def lowest(score: torch.Tensor, count: int) -> set[int]:
    """Half of them from each block of experts, as routing by groups has it."""
    half = EXPERTS // 2
    order = sorted(range(EXPERTS), key=lambda e: (float(score[e]), e))
    return {e for block in (0, 1) for e in [i for i in order if i // half == block][: count // 2]}


def test_it_is_what_loops_over_experts_give() -> None:
    found = statistics()
    plan = planned(found)
    measured = coverage(plan.groups, found, criteria()["router-mass"], None)
    assert measured is not None
    for d, name in enumerate(DOMAINS):
        gone = every = 0.0
        same = total = 0
        for g in plan.groups:
            gate = found.sums[g.name]["gate"]
            for e in range(EXPERTS):
                every += float(gate[d, e])
                gone += float(gate[d, e]) if e not in g.kept else 0.0
            rest = sum(gate[i] for i in range(3) if i != d)
            assert isinstance(rest, torch.Tensor)
            total += 4
            same += len(lowest(gate.sum(0), 4) & lowest(rest, 4))
        assert measured.routed[name] == pytest.approx(gone / every, rel=1e-3)
        assert measured.without[name] == pytest.approx(same / total, abs=1e-4)
    sides: list[dict[str, set[int]]] = [{}, {}]
    by_domain = {d: [i for i in range(30) if i % 3 == d] for d in range(3)}  # of sequence ids
    for side in (0, 1):
        chosen = {i for ids in by_domain.values() for i in ids[side::2]}
        for g in found.groups:
            score = torch.zeros(EXPERTS, dtype=torch.float64)
            for s, i in enumerate(found.sequence_ids.tolist()):
                if i in chosen:
                    score += found.rows[g.name][s].square()
            sides[side][g.name] = lowest(score, 4)
    both = sum(len(sides[0][n] & sides[1][n]) for n in sides[0])
    assert measured.halves == pytest.approx(both / 12, abs=1e-4)
    assert measured.chance == pytest.approx(4 / 12, abs=1e-4)


def test_halves_are_asked_by_what_the_default_score_is_made_of() -> None:
    """Where its sums are kept, rows or none: by the diagonals of both halves' second order."""
    found = statistics(rows=0)
    ids = torch.arange(30)
    delta = {g.name: torch.rand(30, EXPERTS, dtype=torch.float64) for g in found.groups}
    sums = {}
    for name, d in delta.items():
        whole = torch.stack([d[ids % 3 == i].T @ d[ids % 3 == i] for i in range(3)])
        half = torch.stack([d[(ids % 3 == i) & (ids % 2 == 0)].square().sum(0) for i in range(3)])
        sums[name] = found.sums[name] | {"removed_gram": whole, "removed_half_sq": half}
    full = replace(found, sums=sums, sequence_ids=ids, sequence_domains=ids % 3)
    plan, rule = planned(found), criteria()["counterfactual-set"]
    for weights in (None, {"b": 0.0, "c": 2.0}):
        measured = coverage(plan.groups, full, rule, weights)
        assert measured is not None
        both = 0
        for d in delta.values():
            w = torch.tensor(domain_weights(DOMAINS, weights), dtype=torch.float64)[ids % 3]
            sides = [w[ids % 2 == i] @ d[ids % 2 == i].square() for i in (0, 1)]
            both += len(lowest(sides[0], 4) & lowest(sides[1], 4))
        assert measured.halves == pytest.approx(both / 12, abs=1e-4)
        assert measured.halves_by == "counterfactual-fisher"
    assert "by the second order of the loss, halves of the text" in said(plan, vars(measured))[2]
    # another score is asked by rows, of which there are none; one half alone agrees with nothing
    measured = coverage(plan.groups, full, criteria()["router-mass"], None)
    assert measured is not None
    assert (measured.halves, measured.halves_by) == (None, None)
    one = replace(full, sequence_ids=2 * ids)
    measured = coverage(plan.groups, one, rule, None)
    assert measured is not None
    assert measured.halves is None


def test_a_domain_without_weight_is_no_part_of_the_choice() -> None:
    found, weights = statistics(), {"c": 0.0}
    plan = planned(found)
    measured = coverage(plan.groups, found, criteria()["router-mass"], weights)
    assert measured is not None
    assert {*measured.without} == {"a", "b"}
    assert {*measured.routed} == {*DOMAINS}
    assert domain_weights(DOMAINS, weights) == [1.0, 1.0, 0.0]


@pytest.mark.parametrize(
    "name", sorted(n for n, c in criteria().items() if "sketch" not in c.needs)
)
def test_a_criterion_looks_at_nothing_but_what_it_names(name: str) -> None:
    """Else what is left without a domain would be another criterion's."""
    rule = criteria()[name]
    draw = torch.Generator().manual_seed(5)
    stored = statistics()
    shapes = {"E": (EXPERTS,), "E D": (EXPERTS, 4), "E E": (EXPERTS, EXPERTS)}
    sums = {
        g.name: {
            n: torch.rand(3, *shapes[s.shape], generator=draw, dtype=torch.float64)
            for n, s in known().items()
            if s.shape in shapes
        }
        for g in stored.groups
    }
    full = replace(stored, sums=sums)
    named = {g: {k: v for k, v in s.items() if k in rule.needs} for g, s in sums.items()}
    for group, values in rule(full).values.items():
        assert torch.equal(values, rule(replace(stored, sums=named)).values[group])


def test_what_cannot_be_said_is_left_out() -> None:
    found = statistics(rows=0)
    rule = criteria()["router-mass"]
    assert coverage(planned(found, keep=12).groups, found, rule, None) is None
    measured = coverage(planned(found).groups, found, rule, None)
    assert measured is not None
    assert (measured.halves, measured.chance) == (None, None)
    one = replace(
        found, domains=("a",), sums={n: {k: v[:1] for k, v in s.items()}
                                     for n, s in found.sums.items()},
        tokens=found.tokens[:1], sequences=found.sequences[:1],
    )  # fmt: skip
    measured = coverage(planned(one).groups, one, rule, None)
    assert measured is not None
    assert measured.without == {}


def said(plan: Plan, explanation: object) -> list[str]:
    made = replace(plan, explanation={"coverage": explanation})
    return [t.text for t in coverage_lines(made)]


def test_how_it_is_said() -> None:
    plan = planned(statistics())
    found = Coverage({"a": 0.02, "b": 0.1}, {"a": 0.9, "b": 0.8}, 0.5, 0.3333)
    lines = said(plan, vars(found))
    assert lines[0] == "the router's weight that went to removed experts: b 10.0%, a 2.0%"
    assert lines[1].endswith("without a domain's text too: a 90.0%, b 80.0%")
    assert "agree on 50% of the removed experts (by chance 33%)" in lines[2]
    assert lines[3] == "the text is too little for a firm choice: give more --samples"
    assert len(said(plan, vars(replace(found, halves=0.9)))) == 3
    made = replace(plan, explanation={"coverage": vars(found)})
    tables = [b for b in coverage_blocks(made) if isinstance(b, Table)]
    assert tables[0].rows == (("a", "2.0%", "90.0%"), ("b", "10.0%", "80.0%"))


@pytest.mark.parametrize(
    "explanation",
    ["text", {"routed": "x", "halves": "y", "chance": 1}, {"routed": {"a": "<b>"}}, {"halves": []}],
)
def test_a_plan_of_somebody_elses(explanation: object) -> None:
    plan = planned(statistics())
    assert said(plan, explanation) == []
    assert list(coverage_blocks(replace(plan, explanation={"coverage": explanation}))) == []


def test_a_rule_without_text_has_no_domain_to_miss() -> None:
    found = statistics()
    weights = {"weight_abs": 1.0, "weight_sq": 2.0, "weight_count": 1.0}
    constants = {
        g.name: {k: torch.rand(EXPERTS, dtype=torch.float64) + v for k, v in weights.items()}
        for g in found.groups
    }
    found = replace(found, constants=constants)
    measured = coverage(planned(found, "aimer").groups, found, criteria()["aimer"], None)
    assert measured is not None
    assert measured.without == {}
    assert {*measured.routed} == {*DOMAINS}
