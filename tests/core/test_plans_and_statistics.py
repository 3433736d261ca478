"""Plans and statistics as files: round trips, refusals, merging; targets met."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from moe_fair.core.criterion import Criterion, round_significant
from moe_fair.core.plan import ModelSize, Plan, Target, make_plan
from moe_fair.core.units import Scores, Statistics, UnitGroup

GROUPS = tuple(UnitGroup(f"l{i}", i, 12, 2, unit_parameters=10, unit_bytes=20) for i in range(4))
BEFORE = ModelSize(1000, 2000)


def scores(name: str, seed: int) -> Scores:
    g = torch.Generator().manual_seed(seed)
    return Scores(
        name, {x.name: torch.rand(x.size, generator=g, dtype=torch.float64) for x in GROUPS}
    )


def plan(target: Target, allocator: str = "tod", **limits: int) -> Plan:
    return make_plan(
        GROUPS, scores("u", 0), scores("r", 1), target=target, allocator=allocator, before=BEFORE,
        **limits,
    )  # fmt: skip


@pytest.mark.parametrize(
    ("target", "kept"),
    [
        (Target(mean_kept=8), 32), (Target(mean_kept=7.25), 29), (Target(total=31), 31),
        (Target(ratio=0.25), 36), (Target(parameters=900), 38), (Target(bytes=1700), 33),
    ],
)  # fmt: skip
def test_targets_are_met_exactly(target: Target, kept: int) -> None:
    made = plan(target)
    assert sum(len(g.kept) for g in made.groups) == kept
    assert made.after == ModelSize(1000 - 10 * (48 - kept), 2000 - 20 * (48 - kept))


def test_the_plan_says_which_expert_parallel_sizes_divide() -> None:
    for step, total in ((1, 30), (2, 30), (3, 30), (4, 32), (6, 36)):
        made = plan(Target(total=total), multiple_of=step)
        counts = [len(g.kept) for g in made.groups]
        assert made.expert_parallel == [n for n in range(1, 13) if not any(c % n for c in counts)]
        assert step in made.expert_parallel
        assert json.loads(made.to_json())["expert_parallel"] == made.expert_parallel
    assert plan(Target(total=48)).expert_parallel == [1, 2, 3, 4, 6, 12]


def test_a_whole_number_of_experts() -> None:
    with pytest.raises(ValueError, match=r"not a whole number; the nearest are 7\.25 and 7\.5"):
        plan(Target(mean_kept=7.3))


@pytest.mark.parametrize(
    "given", [{}, {"total": 3, "ratio": 0.5}, {"ratio": 1.0}, {"tolerance": 2.0}]
)
def test_targets_that_cannot_be(given: dict[str, float]) -> None:
    with pytest.raises(ValueError, match=r"exactly one target|not between"):
        Target(**given)  # type: ignore[arg-type]


@pytest.mark.parametrize(("share", "step", "kept"), [(1 / 3, 5, 30), (0.25, 4, 36), (0.25, 5, 35)])
@pytest.mark.parametrize("allocator", ["uniform", "global", "tod"])
def test_a_share_is_rounded_to_what_steps_allow(
    allocator: str, share: float, step: int, kept: int
) -> None:
    made = plan(Target(ratio=share), allocator, multiple_of=step)
    assert sum(len(g.kept) for g in made.groups) == kept
    assert ("is the nearest that they allow" in " ".join(made.notes)) == (kept != 48 * (1 - share))
    with pytest.raises(ValueError, match="floors and multiples allow"):
        plan(Target(ratio=0.95), allocator, multiple_of=step)
    with pytest.raises(ValueError, match="in steps of"):
        plan(Target(total=31), allocator, multiple_of=step)  # a number is meant exactly


def test_size_out_of_reach_says_the_smallest() -> None:
    with pytest.raises(ValueError, match="600 parameters"):
        plan(Target(parameters=599))


def test_the_ceiling_is_said() -> None:
    notes = " ".join(plan(Target(mean_kept=3)).notes)
    assert "75.0%" in notes
    assert "0.667" in notes


def test_only_layers_at_their_ceiling_are_named() -> None:
    made = plan(Target(tolerance=0.25))
    bound = {g.layer for g in made.groups if g.depth and g.depth >= (g.ceiling or 0)}
    below = {g.layer for g in made.groups if g.depth} - bound
    assert below, "this case is to have layers of either kind, or of the second"
    [note] = [n for n in made.notes if "binds" in n] or [""]
    named = {int(x) for x in note.rpartition("layer")[2].strip("s ").split(", ") if x}
    assert named == bound


def test_a_plan_is_the_same_bytes_again(tmp_path: Path) -> None:
    made = plan(Target(total=31))
    made.save(tmp_path / "plan.json")
    loaded = Plan.load(tmp_path / "plan.json")
    assert loaded == made
    assert loaded.to_json() == plan(Target(total=31)).to_json()


@pytest.mark.parametrize("kept", [[], [0, 0], [3, 1], [-1, 2], [11, 12], ["a"], [True, 2], [0.5]])
def test_impossible_ids_are_refused(tmp_path: Path, kept: list) -> None:
    raw = json.loads(plan(Target(total=31)).to_json())
    raw["groups"][1]["kept"] = kept
    (tmp_path / "plan.json").write_text(json.dumps(raw))
    with pytest.raises(ValueError, match="kept ids must be"):
        Plan.load(tmp_path / "plan.json")


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"format": "other"}', "{"])
def test_other_files_are_refused(tmp_path: Path, text: str) -> None:
    (tmp_path / "plan.json").write_text(text)
    with pytest.raises(ValueError, match="not a moe_fair plan"):
        Plan.load(tmp_path / "plan.json")


def statistics(ids: list[int], seed: int) -> Statistics:
    g = torch.Generator().manual_seed(seed)
    new = lambda *s: torch.rand(*s, generator=g, dtype=torch.float64)  # noqa: E731
    domains = torch.tensor([i % 2 for i in ids])
    return Statistics(
        groups=GROUPS,
        domains=("a", "b"),
        sums={x.name: {"tokens": new(2, 12), "output": new(2, 12, 3)} for x in GROUPS},
        constants={x.name: {"weight_sq": torch.ones(12, dtype=torch.float64)} for x in GROUPS},
        rows={x.name: new(len(ids), 12) for x in GROUPS},
        sequence_ids=torch.tensor(ids),
        sequence_domains=domains,
        tokens=new(2),
        sequences=torch.bincount(domains, minlength=2).double(),
        fingerprint={"model": "m"},
        metadata={"x": 1},
    )


def test_merging_adds_and_orders_the_rows() -> None:
    a, b = statistics([0, 3], 0), statistics([1, 2], 1)
    both = b.merge(a)
    assert both.sequence_ids.tolist() == [0, 1, 2, 3]
    assert torch.equal(both.sums["l1"]["output"], b.sums["l1"]["output"] + a.sums["l1"]["output"])
    assert torch.equal(both.rows["l2"][[0, 3]], a.rows["l2"])
    assert both.sequences.tolist() == [2, 2]
    with pytest.raises(ValueError, match="share calibration sequences"):
        both.merge(a)


def test_statistics_are_the_same_bytes_again(tmp_path: Path) -> None:
    made = statistics([0, 1, 2], 0)
    first = made.save(tmp_path / "a").read_bytes()
    loaded = Statistics.load(tmp_path / "a")
    assert loaded.save(tmp_path / "b").read_bytes() == first
    assert loaded.groups == GROUPS
    assert torch.equal(loaded.sums["l0"]["output"], made.sums["l0"]["output"])


def test_domain_weights_weigh_sums_rows_and_counts() -> None:
    s = statistics([0, 1, 2], 0)
    view = s.view(GROUPS[0], {"a": 2.0, "b": 0.5})
    expected = 2 * s.sums["l0"]["tokens"][0] + 0.5 * s.sums["l0"]["tokens"][1]
    assert torch.allclose(view["tokens"], expected, rtol=1e-15)
    assert view.row_weights.tolist() == [2.0, 0.5, 2.0]
    assert view.total_sequences == 4.5
    with pytest.raises(ValueError, match="no calibration domain 'c'"):
        s.view(GROUPS[0], {"c": 1})


def test_a_missing_statistic_and_a_nan_are_said() -> None:
    s = statistics([0], 0)
    with pytest.raises(ValueError, match="needs taylor"):
        Criterion("x", ("taylor",), "", lambda v: v["taylor"])(s)
    with pytest.raises(ValueError, match="nan for unit 0"):
        Criterion("x", ("tokens",), "", lambda v: v["tokens"] * float("nan"))(s)


def test_rounding_hides_the_order_of_summation() -> None:
    x = torch.tensor([1 / 3, 2e-30, 0.0, -123456.789123456], dtype=torch.float64)
    assert torch.equal(round_significant(x), round_significant(x * (1 + 1e-13)))
    assert round_significant(x)[2] == 0
