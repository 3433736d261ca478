"""Methods in one text, through the commands: the same plan as in the older form, and refusals."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from places import MODEL

import moe_fair
from moe_fair.core.recipe import Recipe
from moe_fair.pipelines.rivals import rivals


@pytest.mark.parametrize(
    ("text", "older"),
    [
        ("reap/global", {"method": "reap", "allocate": "global"}),
        ("taylor-sq:reap/tod", {"removal": "taylor-sq", "protection": "reap", "allocate": "tod"}),
        ("fair:reap", {"method": "fair", "protection": "reap"}),
        ("second-order/uniform", {"allocate": "uniform"}),
    ],
)
def test_the_same_plan(statistics_folder: Path, text: str, older: dict[str, str]) -> None:
    plans = [moe_fair.plan(statistics_folder, experts=40, **s) for s in ({"method": text}, older)]
    assert plans[0].kept == plans[1].kept
    assert (plans[0].removal, plans[0].protection, plans[0].allocator) == (
        plans[1].removal, plans[1].protection, plans[1].allocator,
    )  # fmt: skip


def test_rivals_have_the_same_grammar() -> None:
    found = rivals(Recipe(method="ean+refit", rivals=("taylor-sq:reap/tod", "reap")))
    assert found["taylor-sq:reap/tod"].parts["protection"] == "reap"
    assert found["reap"].parts["allocate"] is None
    said = r"--rivals reap\+refit: the result's repair is that of --repair"
    with pytest.raises(ValueError, match=said):
        rivals(Recipe(rivals=("reap+refit",)))


@pytest.mark.parametrize(
    ("given", "said"),
    [
        (["reap/global", "--allocate", "uniform"], "--method 'reap/global' and --allocate"),
        (["reap+refit", "--repair", "none"], "--method 'reap+refit' and --repair 'none'"),
        (["raep/global"], "no method 'raep' (did you mean 'reap'"),
        (["reap:taylr/tod"], "no criterion 'taylr' (did you mean 'taylor'"),
        (["reap/globl"], "no allocator 'globl' (did you mean 'global'"),
        (["reap+refti"], "no repair 'refti' (did you mean 'refit'"),
        (["reap//global"], "write REMOVAL[:PROTECTION][/ALLOCATOR][+REPAIR]"),
    ],
)
def test_refusals(fails: Callable[..., str], tmp_path: Path, given: list[str], said: str) -> None:
    line = fails("prune", MODEL, "--experts", 40, "-o", tmp_path / "out", "--method", *given)
    assert said in line
