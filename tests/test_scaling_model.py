"""The cost model of eval/SCALING.md holds at a size that fits here, term by term."""

from __future__ import annotations

import pytest
from places import ROOT
from processes import python

TERMS = {
    "parameters", "bytes of one layer, float32", "bytes read", "FLOPs", "boundary activations",
    "statistics",
}  # fmt: skip


@pytest.mark.nightly
@pytest.mark.slow
def test_every_term_is_what_is_measured() -> None:
    done = python(ROOT / "eval" / "scaling.py", "--check")
    assert done.returncode == 0, done.stderr
    rows = [line.strip("| ").split(" | ") for line in done.stdout.splitlines()[2:]]
    found = {(model, term): float(ratio) for model, term, _, _, ratio in rows}
    for kind in ("small qwen3_moe", "small deepseek_v3"):
        assert {term for model, term in found if model == kind} == TERMS
    assert len(found) == 3 + 2 * len(TERMS)
    assert all(abs(ratio - 1) < 1e-3 for ratio in found.values()), found


@pytest.mark.slow
def test_the_tables_are_those_of_the_script() -> None:
    done = python(ROOT / "eval" / "scaling.py")
    assert done.stdout.strip() in (ROOT / "eval" / "SCALING.md").read_text()
