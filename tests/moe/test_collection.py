"""What is collected follows from what is asked; a statistic of another package is one of them."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from places import CALIBRATION, MODEL
from torch import Tensor

import moe_fair
from moe_fair.cli import main
from moe_fair.core import registry
from moe_fair.core.criterion import Criterion
from moe_fair.core.recipe import Recipe
from moe_fair.core.recipe_file import load_recipe
from moe_fair.core.units import GroupView, Statistics
from moe_fair.moe import criteria, statistics
from moe_fair.moe.statistic import Pass, Statistic
from moe_fair.pipelines.calibrate import collect
from moe_fair.pipelines.collection import for_calibrate, for_prune
from moe_fair.pipelines.opening import calibration_set, open_model
from moe_fair.pipelines.rivals import rivals

pytestmark = pytest.mark.slow  # whole runs, by and large

TEXT = ["-c", str(CALIBRATION), "--samples", "8", "--length", "32", "--batch-size", "4"]
PLAIN = {"routing", "output_norms", "weights"}
USUAL = PLAIN | {"output_vectors", "taylor", "counterfactual"}
Fails = Callable[..., str]


def run(*arguments: object) -> None:
    with pytest.raises(SystemExit, match="0"):
        main([str(a) for a in arguments])


@pytest.mark.parametrize(
    ("asked", "families", "backward"),
    [
        ({}, USUAL, True),
        ({"for_": ["default"]}, USUAL, True),
        ({"for_": ["reap", "fair-u"]}, {"routing", "output_norms", "u_score", "taylor"}, True),
        ({"for_": ["reap/global"]}, {"routing", "output_norms"}, False),
        ({"for_": ["reconstruction"]}, {"counterfactual"}, False),
        ({"for_": ["aimer"]}, {"weights"}, False),
        ({"for_": ["naee", "merge"]}, {"gram", "routing", "output_vectors"}, False),
        ({"for_": ["taylor-sq/fisher"]}, {"taylor"}, True),
        ({"for_": ["counterfactual-measured"]}, {"alone", "counterfactual"}, True),
        ({"for_": ["reap"], "curves": "taylor"}, {"routing", "output_norms", "taylor"}, True),
        ({"for_": ["reap"], "rivals": ["mone"]},
         {"routing", "output_norms", "output_vectors"}, False),
        ({"method": "naee"}, USUAL | {"gram"}, True),
        # of earlier versions
        ({"taylor": False}, USUAL - {"taylor"}, False),
        ({"counterfactual": False}, USUAL - {"counterfactual"}, True),
        ({"taylor": False, "counterfactual": False}, PLAIN | {"output_vectors"}, False),
        ({"u_score": True, "gram": True}, USUAL | {"u_score", "gram"}, True),
        ({"alone": True}, USUAL | {"alone"}, True),
        ({"taylor": True, "u_score": False}, USUAL, True),
    ],
    ids=lambda x: str(sorted(x)) if isinstance(x, set) else str(x),
)  # fmt: skip
def test_calibrate_collects_what_is_asked(
    asked: dict[str, Any], families: set[str], backward: bool
) -> None:
    recipe = Recipe(**{k: tuple(v) if isinstance(v, list) else v for k, v in asked.items()})
    found = for_calibrate(recipe, rivals(recipe))
    assert set(found.names) == families
    assert found.backward is backward
    without = {n for n, s in found.statistics().items() if not s.needs_backward}
    assert (set(found.statistics()) == without) is not backward


@pytest.mark.parametrize(
    ("asked", "families", "backward"),
    [
        ({}, USUAL, True),  # the rivals' too
        ({"method": "second-order"}, PLAIN | {"counterfactual"}, True),
        ({"method": "reap"}, PLAIN, False),
        ({"method": "reap", "rivals": ("taylor-sq/global",)}, PLAIN | {"taylor"}, True),
        ({"method": "fair-u"}, PLAIN | {"u_score", "taylor"}, True),
        ({"method": "naee"}, PLAIN | {"gram"}, False),
        ({"allocate": "fisher"}, PLAIN | {"taylor"}, True),
        ({"reduce": "merge"}, PLAIN | {"output_vectors"}, False),
        ({"reduce": "ream"}, PLAIN | {"similarity"}, False),
        # of earlier versions
        ({"method": "reap", "u_score": True}, PLAIN | {"u_score"}, False),
        ({"method": "naee", "taylor": False, "counterfactual": False}, PLAIN | {"gram"}, False),
    ],
    ids=lambda x: str(sorted(x)) if isinstance(x, set) else str(x),
)
def test_prune_collects_what_its_plans_need(
    asked: dict[str, Any], families: set[str], backward: bool
) -> None:
    recipe = Recipe(experts=4, **asked)
    found = for_prune(recipe, rivals(recipe).values())
    assert set(found.names) == families
    assert found.backward is backward


@pytest.mark.nightly
def test_the_file_holds_just_that_and_the_plan_says_what_is_missing(
    tmp_path: Path, fails: Fails
) -> None:
    run("calibrate", MODEL, *TEXT, "--for", "reap, fair-u", "-o", tmp_path / "stats")
    held = Statistics.load(tmp_path / "stats")
    sums = {"tokens", "gate", "gate_sq", "norm", "norm_sq", "gated_norm", "gated_norm_sq",
            "turned_norm", "taylor", "taylor_abs", "taylor_sq"}  # fmt: skip
    for group in held.groups:
        assert set(held.sums[group.name]) == sums
        assert group.name in held.sketches
        assert group.name in held.rows
    assert held.constants == {}
    assert "held_back" not in held.metadata["calibration"]  # --for names methods: no rivals
    for method in ("reap", "fair-u", "fair", "taylor-sq"):
        assert moe_fair.plan(held, experts=40, method=method).kept
    plan = ["plan", tmp_path / "stats", "--experts", 40]
    for given, missing, name in (
        ([], "removed_first, removed_first_sq, removed_gram", "second-order"),
        (["--method", "mone"], "output, output_sq", "mone"),
        (["--method", "naee"], "gated_gram", "naee"),
        (["--removal", "aimer", "--protection", "reconstruction", "--allocate", "tod"],
         "removed_error, weight_abs", "aimer/tod,reconstruction"),
        (["--reduce", "merge"], "output", "frequency,merge"),
        (["--reduce", "ream"], "gated_output, router_gram", "reap,ream"),
    ):  # fmt: skip
        said = fails(*plan, *given)
        assert f"needs {missing}" in said
        assert f"`moe-fair calibrate --for {name}`" in said
        for_calibrate(Recipe(for_=tuple(name.split(","))))  # and that can be asked for
    assert (load := load_recipe(tmp_path / "stats" / "recipe.yaml")).for_ == ("reap", "fair-u")
    assert "for:\n- reap\n- fair-u\n" in load.to_yaml()
    run("calibrate", "--recipe", tmp_path / "stats" / "recipe.yaml", "-o", tmp_path / "again")
    again = (tmp_path / "again" / "statistics.safetensors").read_bytes()
    assert again == (tmp_path / "stats" / "statistics.safetensors").read_bytes()


@pytest.mark.parametrize(
    ("given", "said"),
    [
        (["--for", "raep"], "--for raep: no method 'raep' (did you mean 'reap'"),
        (["--for", "reap/tdo"], "--for reap/tdo: no allocator 'tdo'"),
        (["--for", "reap/curves"], "cost curves are measured with --curves reap"),
        (["--for", ""], "--for '': write REMOVAL"),
        (["--for", "reap", "--no-taylor"], "give --for or --no-taylor, not both"),
        (["--for", "reap", "--u-score"], "give --for or --u-score, not both"),
        (["--for", "reap", "--checkpointing"], "there is no backward"),
        (["--for", "counterfactual-measured", "--engine", "streaming"], "whole model in memory"),
    ],
    ids=lambda x: str(sorted(x)) if isinstance(x, set) else str(x),
)
def test_what_cannot_be_asked_for(
    given: list[str], said: str, fails: Fails, tmp_path: Path
) -> None:
    assert said in fails("calibrate", MODEL, *TEXT, *given, "-o", tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


def test_one_domain_cannot_be_compared(fails: Fails, tmp_path: Path) -> None:
    text = ["-c", CALIBRATION / "python.jsonl", "--samples", 4, "--length", 32]
    said = fails("calibrate", MODEL, *text, "--for", "reap,fair-u", "-o", tmp_path / "out")
    assert "--for fair-u: u-score compares calibration domains" in said


def test_the_flags_of_earlier_versions_are_hidden(capsys: pytest.CaptureFixture[str]) -> None:
    run("calibrate", "--help")
    shown = capsys.readouterr().out
    assert "--for" in shown
    for name in ("taylor", "counterfactual", "u-score", "gram", "alone"):
        assert f"--{name}" not in shown
        assert f"--no-{name}" not in shown


def test_prune_takes_no_for(fails: Fails, tmp_path: Path, statistics_folder: Path) -> None:
    with pytest.raises(ValueError, match="prune does not use for_"):
        moe_fair.prune(str(MODEL), tmp_path / "out", experts=40, for_=["reap"])
    (tmp_path / "r.yaml").write_text("for: reap\nexperts: 40\n")
    said = fails("prune", MODEL, *TEXT, "--recipe", tmp_path / "r.yaml", "-o", tmp_path / "out")
    assert "--for would change nothing: prune collects what its method needs" in said


def test_one_recipe_for_all_stages(tmp_path: Path) -> None:
    """What `calibrate` has honoured is no reason to refuse."""
    recipe = tmp_path / "r.yaml"
    recipe.write_text("for: [reap]\nmethod: reap\nexperts: 40\nrepair: none\n")
    run("calibrate", MODEL, *TEXT, "--recipe", recipe, "-o", tmp_path / "stats")
    stats = ["--stats", tmp_path / "stats", "--dry-run"]
    run("prune", MODEL, "--recipe", recipe, *stats, "-o", tmp_path / "out")


def test_statistics_that_lack_something_are_refused_before_anything_is_measured(
    fails: Fails, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also where removals are to be measured first, and for a rival that is named."""
    run("calibrate", MODEL, *TEXT, "--for", "reap", "-o", tmp_path / "stats")
    monkeypatch.setattr("moe_fair.moe.checkpoint_source.Checkpoint.load", lambda *_: 1 / 0)
    stats = ["prune", MODEL, "--stats", tmp_path / "stats", "--experts", 40, "-o", tmp_path / "out"]
    said = fails(*stats, "--method", "counterfactual-measured")
    assert "needs removed_first, removed_first_sq, removed_gram" in said
    assert "needs output, output_sq" in fails(*stats, "--method", "mone", "--allocate", "curves")
    assert "--rivals mone: " in fails(*stats, "--method", "reap", "--rivals", "mone")


# a package that brings a family of statistics and a criterion that needs it
def accumulate(seen: Pass) -> dict[str, Tensor]:
    """Σ g² on its own ways."""
    values = seen.g.square() if seen.counted is None else seen.g.square() * seen.counted
    total = torch.zeros(seen.size, dtype=torch.float64)
    return {"squared": total.scatter_add_(0, seen.ids, values)}


def backward(seen: Pass) -> dict[str, Tensor]:
    """Σ max(t, 0)."""
    t = seen.gradient.flatten().double() * seen.g
    return seen.per_expert({"positive": t.clamp(min=0)})


def score(view: GroupView) -> Tensor:
    return view["squared"] * view["positive"]


NEWCOMER = SimpleNamespace(
    name="newcomer",
    names={
        "squared": Statistic("E", "Σ g²"),
        "positive": Statistic("E", "Σ max(t, 0)", needs_backward=True),
    },
    accumulate=accumulate,
    backward=backward,
)
RULE = Criterion("newcomers-rule", ("squared", "positive"), "a test", score)


def forget() -> None:
    for found in (criteria.criteria, statistics.families, statistics.statistics):
        found.cache_clear()


@pytest.fixture
def installed(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., None]]:
    """Installs a package with these families of statistics, and the criterion."""

    def install(*families: SimpleNamespace) -> None:
        groups: dict[str, list[Any]] = {
            "moe_fair.statistics": list(families),
            "moe_fair.criteria": [SimpleNamespace(criteria=(RULE,))],
        }

        def entry_points(group: str) -> list[SimpleNamespace]:
            found = enumerate(groups.get(group, ()))
            return [SimpleNamespace(name=str(i), load=lambda x=x: x) for i, x in found]

        monkeypatch.setattr(registry, "entry_points", entry_points)
        forget()

    yield install
    monkeypatch.undo()
    forget()


def test_a_statistic_of_another_package(
    installed: Callable[..., None], tmp_path: Path, fails: Fails
) -> None:
    run("calibrate", MODEL, *TEXT, "--rivals", "none", "-o", tmp_path / "usual")
    installed(NEWCOMER)
    run("calibrate", MODEL, *TEXT, "--for", RULE.name, "-o", tmp_path / "stats")
    found, usual = (Statistics.load(tmp_path / n) for n in ("stats", "usual"))
    assert "newcomer" in found.fingerprint["run"]
    for group in found.groups:
        sums, known = found.sums[group.name], usual.sums[group.name]
        assert sums.keys() == {"squared", "positive"}
        torch.testing.assert_close(sums["squared"], known["gate_sq"])
        torch.testing.assert_close(sums["positive"], (known["taylor_abs"] + known["taylor"]) / 2)
    plan = moe_fair.plan(found, experts=40, method=RULE.name)
    assert plan.removal == RULE.name
    for group in plan.groups:
        total = {k: v.sum(0) for k, v in found.sums[group.name].items()}
        value = total["squared"] * total["positive"]
        gone = [e for e in range(60) if e not in group.kept]
        assert len(gone) == 20
        assert value[group.kept].min() >= value[gone].max()
    said = fails("plan", tmp_path / "usual", "--experts", 40, "--method", RULE.name)
    assert "needs positive, squared, which these statistics do not hold; collect it with " in said
    assert f"--for {RULE.name}" in said


@pytest.mark.parametrize(
    ("families", "said"),
    [
        ([], "no family of statistics has 'positive'"),
        ([NEWCOMER, SimpleNamespace(name="other", names={"squared": Statistic("E", "Σ g")})],
         "the statistics 'newcomer' and 'other' both have a 'squared'"),
        ([SimpleNamespace(**{**vars(NEWCOMER), "backward": lambda seen: {"positive": seen.g}})],
         "the statistics 'newcomer' give positive [256] for 60 experts, and declare E"),
        ([SimpleNamespace(**{**vars(NEWCOMER), "accumulate": lambda seen: {"x": seen.g}})],
         "declare none"),
    ],
    ids=["none", "twice", "shape", "name"],
)  # fmt: skip
def test_a_package_with_a_mistake(
    families: list[SimpleNamespace], said: str, installed: Callable[..., None], tmp_path: Path,
    fails: Fails,
) -> None:  # fmt: skip
    installed(*families)
    assert said in fails("calibrate", MODEL, *TEXT, "--for", RULE.name, "-o", tmp_path / "out")


def test_a_chunk_of_an_earlier_version_that_lacks_a_sum_is_measured_again(tmp_path: Path) -> None:
    recipe = Recipe(
        model=str(MODEL), calibration=(str(CALIBRATION / "python.jsonl"),), samples=2, length=16,
        save_every=1, batch_size=1,
    )  # fmt: skip
    source = open_model(recipe)
    text, said = calibration_set(recipe, source, lambda _: None), list[str]()
    whole = collect(recipe, source, text, said.append, tmp_path)
    assert whole is not None
    first = Statistics.load(tmp_path / "chunk-00000")
    sums = {
        g: {k: v for k, v in s.items() if k != "removed_half_sq"} for g, s in first.sums.items()
    }
    replace(first, sums=sums).save(tmp_path / "chunk-00000")
    again = collect(recipe, source, text, said.append, tmp_path)
    assert again is not None
    assert any("1 of 2 chunks were done before" in s for s in said)
    for name, values in whole.sums.items():
        assert all(torch.equal(v, again.sums[name][k]) for k, v in values.items())
