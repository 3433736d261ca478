"""Every registered score with every allocator ends in a result, also when it was killed."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from vision.test_vision_flow import settings

from moe_fair.core.allocate import allocators, needs
from moe_fair.core.units import Statistics
from moe_fair.pipelines import vision as pipeline
from moe_fair.vision.criteria import criteria
from moe_fair.vision.settings import UNMEASURED


@pytest.fixture(autouse=True)
def _no_clock(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pipeline, "latency", lambda *_: [])


def usable() -> list[str]:
    """Allocators that need scores alone."""
    return [n for n, rule in allocators().items() if not any(needs(rule, w) for w in UNMEASURED)]


def pairs() -> list[Any]:
    """Every score with every such allocator: one quickly, some in CI, the rest nightly."""
    found = []
    for score in criteria():
        for allocate in usable():
            # a score of activations, of gradients, of weights, of a pass of its own
            some = score in ("u-score", "taylor-so", "bn-scale", "hrank")
            mark = pytest.mark.slow if allocate == "uniform" and some else pytest.mark.nightly
            marks = () if (score, allocate) == ("taylor", "uniform") else (mark,)
            found.append(pytest.param(score, allocate, marks=marks))
    return found


@pytest.mark.parametrize(("score", "allocate"), pairs())
def test_finishes_after_a_kill_and_reports(
    pictures: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, score: str, allocate: str
) -> None:
    wanted = settings(pictures, removal=score, protection=score, allocate=allocate)
    stock = pipeline.write_document
    monkeypatch.setattr(pipeline, "write_document", _killed)
    with pytest.raises(KeyboardInterrupt):
        pipeline.prune(wanted, tmp_path / "out")
    monkeypatch.setattr(pipeline, "write_document", stock)
    said: list[str] = []
    done = pipeline.prune(wanted, tmp_path / "out", say=said.append)
    assert "done before" in said
    kept = [len(g.kept) for g in done.plans[0].groups]
    assert sum(kept) == sum(g.size for g in done.plans[0].groups) // 2
    statistics = Statistics.load(done.output / "moe_fair")
    needed = {n for c in wanted.scores() if c for n in c.needs}
    assert all(statistics.holds(n) for n in needed)
    assert score in (done.output / "moe_fair" / "report.html").read_text()


@pytest.mark.parametrize("allocate", sorted(set(allocators()) - set(usable())))
def test_allocators_that_need_what_is_not_measured_on_images(pictures: Path, allocate: str) -> None:
    with pytest.raises(ValueError, match=f"--allocate {allocate} needs .*: take .*tod"):
        settings(pictures, allocate=allocate)


def _killed(*_: Any) -> None:
    raise KeyboardInterrupt
