"""Groups, plans, statistics and oracles that cannot be: what is said of each."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from test_plans_and_statistics import GROUPS, plan, scores, statistics

from moe_fair.core.criterion import Criterion, mean_over_tokens, round_significant
from moe_fair.core.oracle import Oracle, agreement
from moe_fair.core.plan import Plan, Target, make_plan
from moe_fair.core.units import STATISTICS_FILE, Statistics, UnitGroup


@pytest.mark.parametrize(
    ("values", "said"),
    [
        ({"name": 5}, "must be whole numbers"),
        ({"layer": 0.5}, "must be whole numbers"),
        ({"size": 4.0}, "must be whole numbers"),
        ({"floor": "1"}, "must be whole numbers"),
        ({"blocks": 2.0}, "must be whole numbers"),
        ({"multiple": 1.5}, "must be whole numbers"),
        ({"size": 0, "floor": 0}, "floor 0 outside 0..0 units"),
        ({"floor": -1}, "floor -1 outside 0..12 units"),
        ({"floor": 13}, "floor 13 outside 0..12 units"),
        ({"blocks": 5}, "12 units in 5 equal blocks"),
        ({"blocks": 0}, "12 units in 0 equal blocks"),
        ({"multiple": 0}, "kept counts cannot be multiples of 0"),
    ],
)
def test_groups_that_cannot_be(values: dict[str, Any], said: str) -> None:
    with pytest.raises(ValueError, match=said.replace(".", r"\.")):
        UnitGroup(**{"name": "g", "layer": 0, "size": 12, **values})


def test_groups_at_the_border() -> None:
    g = UnitGroup("g", 0, 12)
    assert (g.floor, g.unit_parameters, g.unit_bytes, g.blocks, g.multiple) == (1, 0, 0, 1, 1)
    for values in ({"floor": 0}, {"floor": 12}, {"blocks": 12}, {"multiple": 1}, {"size": 1}):
        UnitGroup(**{"name": "g", "layer": 0, "size": 12, "floor": 1, **values})  # type: ignore[arg-type]


Change = Callable[[dict[str, Any]], object]


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda p: p.update(groups=[]), "no groups, or sizes"),
        (lambda p: p["groups"][0].update(size=12.0), "no groups, or sizes"),
        (lambda p: p["groups"][0].update(layer="0"), "no groups, or sizes"),
        (lambda p: p["before"].update(parameters=1.5), "no groups, or sizes"),
        (lambda p: p["after"].update(bytes=None), "no groups, or sizes"),
        (lambda p: p["groups"][0].update(name=3), "a group without a name"),
        (lambda p: p["groups"][0].update(kept={"0": 1}), "a group without a name"),
        (lambda p: p["groups"][1].update(name="l0"), "'l0' occurs twice"),
        (lambda p: p.update(fingerprint=[]), "its fingerprint is not a table"),
        (lambda p: p.update(recipe="x"), "its recipe is not a table"),
        (lambda p: p.update(target=None), "its target is not a table"),
        (lambda p: p.update(explanation=3), "its explanation is not a table"),
        (lambda p: p.update(extra=1), "not a moe_fair plan"),
        (lambda p: p.pop("notes"), "not a moe_fair plan"),
        (lambda p: p.update(format="moe_fair.plan/0"), "another format version"),
        (lambda p: p["groups"][0].update(kept=[12]), "must be one or more of 0..11"),
        (lambda p: p["groups"][0].update(kept=[0], merged={"0": {"0": 0.5, "12": 0.5}}),
         "merged that are not there, or twice"),
        (lambda p: p["groups"][0].update(kept=[0, 1], merged={"0": {"0": 1, "2": 1},
         "1": {"1": 1, "2": 1}}), "merged that are not there, or twice"),
        (lambda p: p["groups"][0].update(kept=[0], merged={"0": {"1": 1.0}}),
         "merged into one that does not stay"),
        (lambda p: p["groups"][0].update(kept=[0], merged={"1": {"1": 1.0}}),
         "merged into one that does not stay"),
    ],
)  # fmt: skip
def test_plans_that_cannot_be(tmp_path: Path, change: Change, said: str) -> None:
    raw = json.loads(plan(Target(total=31)).to_json())
    change(raw)
    (tmp_path / "plan.json").write_text(json.dumps(raw))
    with pytest.raises(ValueError, match=said.replace(".", r"\.")):
        Plan.load(tmp_path / "plan.json")


def test_plans_at_the_border(tmp_path: Path) -> None:
    raw = json.loads(plan(Target(total=31)).to_json())
    raw["target"] = {"tolerance": 0.5}  # which any number of units may meet
    raw["expert_parallel"] = []
    raw["groups"][0].update(kept=[0, 11], merged={"0": {"0": 0.5, "3": 0.5}})
    (tmp_path / "plan.json").write_text(json.dumps(raw))
    found = Plan.load(tmp_path / "plan.json")
    assert found.merges
    assert found.groups[0].depth == 10
    assert not plan(Target(total=31)).merges
    with pytest.raises(ValueError, match="no plan at"):
        Plan.load(tmp_path / "none.json")


def test_a_plan_is_written_whole_into_new_folders(tmp_path: Path) -> None:
    made = plan(Target(total=48))
    made.save(tmp_path / "a" / "b" / "plan.json")
    assert [p.name for p in (tmp_path / "a" / "b").iterdir()] == ["plan.json"]
    made.save(tmp_path / "a" / "b" / "plan.json")  # again, over itself
    assert made.uniform
    assert not plan(Target(total=31)).uniform
    assert made.to_json() == json.dumps(json.loads(made.to_json()), indent=1, sort_keys=True) + "\n"


def test_targets_at_their_borders() -> None:
    Target(ratio=0.0)
    Target(tolerance=0.0)
    Target(tolerance=1.0)
    for wrong in ({"ratio": -0.01}, {"ratio": 1.0}, {"tolerance": -0.01}, {"tolerance": 1.01}):
        with pytest.raises(ValueError, match="is not between 0 and 1"):
            Target(**wrong)
    with pytest.raises(ValueError, match=r"--size or --tolerance\); got nothing$"):
        Target()
    with pytest.raises(ValueError, match="got total, ratio"):
        Target(total=1, ratio=0.1)


def test_numbers_that_a_plan_explains() -> None:
    made = plan(Target(tolerance=0.25))
    assert made.tolerance == 0.25
    assert made.target == {"tolerance": 0.25}
    for g in made.groups:
        assert g.null_depth == 3.0
        assert g.ceiling == 6  # 12 / 1.75
        assert g.tod is not None
        assert g.tod <= 0.25
    even = plan(Target(total=40), "uniform")
    assert even.tolerance is None
    assert [g.null_depth for g in even.groups] == [None] * 4
    assert even.notes == []
    filled = plan(Target(total=31))
    assert filled.tolerance == max(g.tod for g in filled.groups if g.tod is not None)
    bare = make_plan(GROUPS, scores("u", 0), None, target=Target(total=40), allocator="uniform",
                     before=even.before)  # fmt: skip
    assert [g.tod for g in bare.groups] == [None] * 4
    assert bare.protection is None
    assert bare.groups[0].protection is None


def damaged(change: Callable[[Statistics], Statistics]) -> Statistics:
    return change(statistics([0, 1, 2], 0))


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda s: replace(s, groups=()), "no groups, or domains without a name"),
        (lambda s: replace(s, domains=("a", 5)), "no groups, or domains without a name"),
        (lambda s: replace(s, fingerprint=[]), "fingerprint or facts are not a table"),
        (lambda s: replace(s, metadata=[1]), "fingerprint or facts are not a table"),
        (lambda s: replace(s, tokens=s.tokens[:1]), "counts that are not those of 2 domains"),
        (lambda s: replace(s, sequences=s.sequences[:1]), "counts that are not those of 2"),
        (lambda s: replace(s, sums={**s.sums, "l1": {"x": torch.ones(2, 11).double()}}),
         "l1: x torch.float64 [2, 11], 12 units"),
        (lambda s: replace(s, sums={**s.sums, "l1": {"x": torch.ones(2, 12)}}),
         "l1: x torch.float32"),
        (lambda s: replace(s, constants={"l1": {"w": torch.ones(11)}}), "l1: w [11] for 12 units"),
        (lambda s: replace(s, rows={"l2": torch.ones(2, 12)}), "l2: 2 rows of 3 sequences"),
    ],
)  # fmt: skip
def test_statistics_that_cannot_be(
    tmp_path: Path, change: Callable[[Statistics], Statistics], said: str
) -> None:
    damaged(change).save(tmp_path)
    with pytest.raises(ValueError) as found:
        Statistics.load(tmp_path)
    assert said in str(found.value)
    assert str(found.value).endswith("; redo it")


def test_curves_may_have_other_lengths(tmp_path: Path) -> None:
    damaged(lambda s: replace(s, constants={"l1": {"curve_x": torch.ones(3)}})).save(tmp_path)
    assert Statistics.load(tmp_path).constants["l1"]["curve_x"].tolist() == [1, 1, 1]
    assert Statistics.load(tmp_path / STATISTICS_FILE).metadata == {"x": 1}  # the file itself


def test_other_files_are_no_statistics(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no statistics at"):
        Statistics.load(tmp_path)
    file = tmp_path / STATISTICS_FILE
    for header in (None, {"moe_fair": "{}"}, {"moe_fair": '{"format": "other"}'}):
        save_file({"x": torch.ones(2)}, file, header)
        with pytest.raises(ValueError, match="of this version"):
            Statistics.load(tmp_path)
    save_file({"x": torch.ones(2)}, file, {"moe_fair": "[]"})
    with pytest.raises(ValueError, match="its header is no table"):
        Statistics.load(tmp_path)
    file.write_bytes(b"x")
    with pytest.raises(ValueError, match="cannot be read as a statistics file"):
        Statistics.load(tmp_path)


def test_shards_of_other_things_are_not_merged() -> None:
    a, b = statistics([0], 0), statistics([1], 1)
    for change in ({"groups": GROUPS[:3]}, {"domains": ("a", "c")}, {"fingerprint": {"m": "n"}}):
        what = next(iter(change))
        with pytest.raises(ValueError, match=f"differ in their {what}"):
            a.merge(replace(b, **change))  # type: ignore[arg-type]
    both = a.merge(b)
    assert both.tokens.tolist() == (a.tokens + b.tokens).tolist()
    assert both.metadata == {"x": 1}


def test_a_group_of_which_nothing_is_known_is_refused(tmp_path: Path) -> None:
    s = statistics([0], 0)
    others = {g.name: s.sums[g.name] for g in GROUPS[1:]}
    rows = {g.name: s.rows[g.name] for g in GROUPS[1:]}
    replace(s, sums=others, constants={}, rows=rows).save(tmp_path)
    with pytest.raises(ValueError, match="l0: neither sums nor constants"):
        Statistics.load(tmp_path)
    # a Taylor score has rows alone, scores without data have constants alone
    replace(s, sums=others, constants={}).save(tmp_path)
    assert Statistics.load(tmp_path).holds("rows")
    replace(s, sums=others).save(tmp_path)
    view = Statistics.load(tmp_path).view(GROUPS[0])
    assert "weight_sq" in view
    assert "tokens" not in view


def test_what_a_view_holds() -> None:
    s = statistics([0, 1, 2], 0)
    view = s.view(GROUPS[0])
    assert view["tokens"].tolist() == s.sums["l0"]["tokens"].sum(0).tolist()
    assert view["weight_sq"].tolist() == [1.0] * 12
    for name, there in (("tokens", True), ("weight_sq", True), ("rows", True), ("sketch", False),
                        ("taylor", False), ("a", False)):  # fmt: skip
        assert (name in view) is there
    assert "rows" not in replace(s, rows={}).view(GROUPS[0])
    half = s.view(GROUPS[0], {"b": 0.0})
    assert half.domain_tokens.tolist() == [s.tokens[0], 0]
    assert half.total_tokens == s.tokens[0]
    scaled = s.view(GROUPS[0], {"a": 3.0}).scaled_rows()
    share = torch.tensor([3.0, 1.0, 3.0]).double() / 7
    wanted = s.rows["l0"] * share.sqrt()[:, None]
    assert torch.allclose(torch.from_numpy(scaled), wanted, rtol=1e-15)


def test_rounding_and_means() -> None:
    x = torch.tensor([123456789.0, 0.00012345678912, -1.5], dtype=torch.float64)
    assert round_significant(x).tolist() == [123456790.0, 0.00012345679, -1.5]
    assert round_significant(x, 2).tolist() == [120000000.0, 0.00012, -1.5]
    assert round_significant(x.view(3, 1)).shape == (3, 1)
    means = mean_over_tokens(torch.tensor([6.0, 5.0, 1.0]), torch.tensor([2.0, 0.0, 1.0]))
    assert means.tolist() == [3.0, 0.0, 1.0]


def test_a_criterion_says_which_units_are_bad() -> None:
    s = statistics([0], 0)
    bad = torch.zeros(12).double()
    bad[[3, 5]] = float("inf")
    with pytest.raises(ValueError, match=r"gives inf for unit 3 of l0 \(2 such units\)"):
        Criterion("x", (), "", lambda v: bad)(s)
    found = Criterion("mine", ("tokens",), "", lambda v: v["tokens"])(s, {"b": 0.0})
    assert found.criterion == "mine"
    wanted = round_significant(s.sums["l2"]["tokens"][0])
    assert torch.equal(found.values["l2"], wanted)


def test_oracles_that_cannot_be(tmp_path: Path) -> None:
    file = tmp_path / "o.safetensors"
    with pytest.raises(ValueError, match="cannot be read as an oracle"):
        Oracle.load(file)
    for header in (None, {"format": "other"}):
        save_file({"x": torch.ones(2)}, file, header)
        with pytest.raises(ValueError, match=r"is not an oracle \(moe_fair\.oracle/1\)"):
            Oracle.load(file)
    with pytest.raises(ValueError, match="different models"):
        agreement({"b": torch.ones(4)}, Oracle({"a": torch.ones(4)}, 1.0, 1))
    ties = agreement({"a": torch.tensor([1.0, 1.0, 2.0, 0.0])},
                     Oracle({"a": torch.tensor([2.0, 2.0, 3.0, 1.0])}, 1.0, 1))  # fmt: skip
    assert ties.spearman == pytest.approx(1.0)
    constant = agreement({"a": torch.arange(3.0)}, Oracle({"a": torch.ones(3)}, 1.0, 1))
    assert (constant.pearson, constant.spearman) == (0.0, 0.0)
