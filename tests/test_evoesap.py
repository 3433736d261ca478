"""The search over budgets: a plan of the same size that `prune` takes, and no worse."""

from __future__ import annotations

import re
import sys
from pathlib import Path

import pytest
from places import CALIBRATION, HELDOUT, MODEL

import moe_fair
from moe_fair.core.plan import Plan

sys.path.insert(0, str(Path(__file__).parent.parent / "eval"))
import evoesap

pytestmark = pytest.mark.slow


@pytest.mark.nightly
def test_the_plan_is_pruned_as_searched(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    small = {"samples": 8, "length": 64, "taylor": False, "counterfactual": False}
    stats, plan = tmp_path / "stats", tmp_path / "plan.json"
    moe_fair.calibrate(str(MODEL), stats, calibration=str(CALIBRATION), **small)
    search = ["--samples", "4", "--length", "32", "-c", str(HELDOUT), "--evaluations", "5"]
    evoesap.main([str(MODEL), str(stats), "--experts", "20", *search, "-o", str(plan)])
    screen = capsys.readouterr()
    assert "in 5 evaluations" in screen.out
    tried = [float(x) for x in re.findall(r"(\d\.\d{5})  \[", screen.err)]
    assert len(tried) == 5
    made = Plan.load(plan)
    assert made.explanation["acceptance"] == pytest.approx(max(tried), abs=1e-5)
    assert made.explanation["acceptance_start"] == pytest.approx(tried[0], abs=1e-5)
    assert sum(len(g.kept) for g in made.groups) == 120
    uniform = moe_fair.plan(stats, experts=20, method="reap")
    for g, u in zip(made.groups, uniform.groups, strict=True):  # along one order
        assert set(g.kept) <= set(u.kept) or set(u.kept) <= set(g.kept)
    assert made.after == uniform.after
    done = moe_fair.prune(str(MODEL), tmp_path / "out", plan=plan, repair="none")
    assert done.plan.kept == made.kept
