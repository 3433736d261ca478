"""The Python functions: checks of the command, paths of any kind, wrong types, torch's modes."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from places import CALIBRATION, MODEL

import moe_fair
from moe_fair.core.plan import Plan
from moe_fair.core.recipe import Recipe
from moe_fair.core.units import Statistics
from moe_fair.moe.checkpoint_source import Checkpoint


@pytest.fixture
def no_model(monkeypatch: pytest.MonkeyPatch) -> None:
    """Loading weights fails the test."""

    def load(*_: object, **__: object) -> None:
        raise AssertionError("a model was loaded")

    monkeypatch.setattr(Checkpoint, "load", load)


@pytest.mark.usefixtures("no_model")
@pytest.mark.parametrize(
    ("given", "flags"),
    [
        ({"experts": 30}, ["--experts", 30]),
        ({"ratio": 0.5}, ["--ratio", 0.5]),
        ({"method": "reap"}, ["--method", "reap"]),
        ({"weights": {"python": 2}}, ["--weights", "python=2"]),
        ({"min_experts": 5}, ["--min-experts", 5]),
        ({"rivals": "reap"}, ["--rivals", "reap"]),
        ({"statistics": ...}, ["--stats", ...]),
    ],
)
def test_a_plan_is_a_decision(
    fails: Callable[..., str],
    tmp_path: Path,
    statistics_folder: Path,
    given: dict[str, Any],
    flags: list[Any],
) -> None:
    """Function and command say the same."""
    plan = tmp_path / "plan.json"
    moe_fair.plan(statistics_folder, experts=40).save(plan)
    given = {k: statistics_folder if v is ... else v for k, v in given.items()}
    flags = [statistics_folder if v is ... else v for v in flags]
    with pytest.raises(ValueError) as e:
        moe_fair.prune(MODEL, tmp_path / "out", plan=plan, **given)
    said = fails("prune", MODEL, "--plan", plan, "-o", tmp_path / "out", *flags)
    assert str(e.value) in said
    assert "--plan" in said
    assert not (tmp_path / "out").exists()


@pytest.mark.usefixtures("no_model")
@pytest.mark.parametrize(
    ("call", "said"),
    [
        (lambda s, t: moe_fair.plan(s, experts=40, samples=9), "plan does not use samples=9"),
        (lambda s, t: moe_fair.plan(s, expert=40), "did you mean 'experts'"),
        (lambda s, t: moe_fair.calibrate(MODEL, experts=40), "calibrate does not use experts=40.0"),
        (
            lambda s, t: moe_fair.prune(MODEL, t, experts=40, curves="reap"),
            "prune does not use cur",
        ),
        (lambda s, t: moe_fair.plan(5), "statistics must be a Statistics or the path"),
        (
            lambda s, t: moe_fair.plan({"a": "x" * 999}),
            "statistics must be a Statistics or the path",
        ),
        (
            lambda s, t: moe_fair.plan(None, experts=4),
            "statistics must be a Statistics or the path",
        ),
        (lambda s, t: moe_fair.prune(MODEL, t, plan=5), "plan must be a Plan or the path"),
        (lambda s, t: moe_fair.prune(MODEL, t, statistics=[s]), "statistics must be a Statistics"),
        (lambda s, t: moe_fair.prune(MODEL, 5, experts=40), "output must be a path, not 5"),
        (lambda s, t: moe_fair.calibrate(MODEL, 5), "output must be a path, not 5"),
        (lambda s, t: moe_fair.calibrate(MODEL, ""), "output must be a path, not ''"),
        (lambda s, t: moe_fair.calibrate(5), "--model must be text, not 5"),
        (
            lambda s, t: moe_fair.calibrate(MODEL, calibration=5),
            "--calibration must be text or a l",
        ),
        (lambda s, t: moe_fair.calibrate(MODEL, samples="5"), "--samples must be a whole number"),
        (lambda s, t: moe_fair.calibrate(MODEL, samples=2.0), "--samples must be a whole number"),
        (lambda s, t: moe_fair.plan(s, ratio=np.nan), "--ratio must be a finite number, not nan"),
        (lambda s, t: moe_fair.plan(s, ratio="x" * 999), "--ratio must be a number, not 'xxx"),
    ],
)
def test_wrong_calls(
    statistics_folder: Path, tmp_path: Path, call: Callable[[Path, Path], object], said: str
) -> None:
    with pytest.raises(ValueError) as e:
        call(statistics_folder, tmp_path / "out")
    assert said in str(e.value)
    assert len(str(e.value)) < 200


def test_paths_and_numpys_numbers(tmp_path: Path) -> None:
    one, two = sorted(CALIBRATION.iterdir())[:2]
    recipe = Recipe(model=MODEL, calibration=[one, two], heldout=one, samples=np.int64(5))  # type: ignore[arg-type]
    assert recipe.model == str(MODEL)
    assert recipe.calibration == (str(one), str(two))
    assert recipe.heldout == (str(one),)
    assert type(recipe.samples) is int
    assert Recipe(ratio=np.float32(0.5)).ratio == 0.5  # type: ignore[arg-type]
    assert type(Recipe(experts=np.int32(40)).experts) is float


def test_a_whole_recipe_may_be_given(statistics_folder: Path) -> None:
    """What is as by default contradicts nothing."""
    plain = Recipe(experts=40).to_dict()
    assert kept(moe_fair.plan(statistics_folder, **plain)) == kept(
        moe_fair.plan(statistics_folder, experts=40)
    )


def kept(plan: Plan | None) -> dict[str, list[int]]:
    assert plan is not None
    return {k: list(v) for k, v in plan.kept.items()}


@pytest.mark.slow
@pytest.mark.nightly
@pytest.mark.parametrize("mode", [torch.inference_mode, torch.no_grad])
def test_within_torchs_modes(
    tmp_path: Path, settings: dict[str, Any], statistics_folder: Path, mode: Callable[[], Any]
) -> None:
    """The same numbers: what needs gradients makes them."""
    settings = {**settings, "calibration": CALIBRATION}
    with mode():
        found = moe_fair.calibrate(MODEL, **settings)
        plan = moe_fair.plan(statistics_folder, experts=20)
        done = moe_fair.prune(MODEL, tmp_path / "out", plan=plan, repair="refit", **settings)
    want = Statistics.load(statistics_folder)
    for group in want.groups:
        assert torch.equal(found.rows[group.name], want.rows[group.name])
        assert not found.rows[group.name].is_inference()
    assert kept(plan) == kept(moe_fair.plan(statistics_folder, experts=20)) == kept(done.plan)
