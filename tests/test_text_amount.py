"""`eval/text_amount.py`: parts of other documents, and what it measures of the reference model."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import pytest
from places import HELDOUT, MODEL, ROOT

from moe_fair.moe.calibration_text import CalibrationSet

sys.path.insert(0, str(ROOT / "eval"))
import text_amount


def test_parts_are_neighbours_of_every_domain() -> None:
    text = CalibrationSet(("a", "b"), tuple(((1, 2), int(i >= 24)) for i in range(40)))
    found = text_amount.parts(text)
    assert found[0] == {0, 1, 2, 24, 25}
    assert sorted(i for p in found for i in p) == list(range(40))


def test_more_text_is_set_beside_what_halves_say() -> None:
    rows = [
        {"model": "m", "ratio": 0.5, "text": "given", "samples": n, "length": 8, "amount": a,
         "halves": 0.5, "by_score": 0.25, "more": more, "increase": 0.1 * a + 0.1 * seed}
        for seed in (0, 1)
        for n, a, more in ((4, 1, {"2": 0.75, "4": 0.5}), (8, 2, {"4": 1.0}), (16, 4, {}))
    ]  # fmt: skip
    lines = text_amount.table(rows).splitlines()
    assert lines[2] == "| m | 50 % | given | 4 × 8 | 0.500 | 0.250 | 0.750 | 0.500 | 0.1500 | - |"
    assert lines[3] == "| m | 50 % | given | 8 × 8 | 0.500 | 0.250 | 1.000 | - | 0.2500 | - |"


@pytest.mark.slow
@pytest.mark.parametrize("heat", [None, 0.7])
@pytest.mark.nightly
def test_the_reference_model(monkeypatch: pytest.MonkeyPatch, heat: float | None) -> None:
    monkeypatch.chdir(ROOT)
    args = argparse.Namespace(
        samples=8, length=16, heldout_samples=4, ratios=[0.5], unseen=Path(HELDOUT)
    )
    rows = list(text_amount.measured(args, str(MODEL), 0, heat))
    assert [r["amount"] for r in rows] == [1, 2, 4]
    assert [{*r["more"]} for r in rows] == [{"2", "4"}, {"4"}, set()]
    for r in rows:
        shares = [r["halves"], r["by_score"], *r["more"].values()]
        assert all(r["chance"] < s <= 1 for s in shares)
        assert r["unseen"] == pytest.approx(r["increase"])  # the same text here
