"""`eval/trial_rules.py`: its rules on changes of the held-back loss."""

from __future__ import annotations

import random
import sys
from typing import Any

import pytest
from places import ROOT

from moe_fair.pipelines import plan_selection

sys.path.insert(0, str(ROOT / "eval"))
import trial_rules


@pytest.mark.parametrize("seed", range(20))
def test_the_least_loss_is_the_default(seed: int) -> None:
    draw = random.Random(seed)
    plans = [("own", draw.gauss(0.01, 0.004), 0.0)]
    plans += [(f"p{i}", draw.gauss(0.009, 0.004), draw.uniform(0, 0.004)) for i in range(4)]
    none: Any = None
    tried = [plan_selection.Tried(n, none, change, stderr) for n, change, stderr in plans]
    judged = {"held back": plans, "all": plans[:1]}
    least = sorted(plans, key=lambda p: p[1])[0][0]
    assert trial_rules.takes("least", judged) == plan_selection.best_of(tried).name == least
    assert trial_rules.takes("least-all", judged) == "own"


def test_half_of_the_margin() -> None:
    """Better by .07 of the own change and .7 of a standard error: enough for half of both."""
    judged = {"held back": [("own", 0.1, 0.0), ("rival", 0.093, 0.01)]}
    assert trial_rules.takes("least", judged) == trial_rules.takes("half", judged) == "rival"
    assert trial_rules.takes("margin", judged) == "own"
