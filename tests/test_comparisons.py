"""`eval/compare.py` on the small model: what it writes, that it goes on, and the rival recipes."""

from __future__ import annotations

import csv
import math
import sys
from pathlib import Path

import pytest
from places import CALIBRATION, HELDOUT, MODEL, ROOT

from moe_fair.core.recipe import Recipe
from moe_fair.core.recipe_file import load_recipe
from moe_fair.moe.criteria import criteria
from moe_fair.pipelines.checks import method

sys.path.insert(0, str(Path(__file__).parent.parent / "eval"))
import compare
import lab

RIVALS = sorted((ROOT / "recipes" / "rivals").glob("*.yaml"))


def row(method: str, ratio: float, seed: int, increase: float, model: str = "m") -> compare.Row:
    return {"model": model, "method": method, "ratio": ratio, "seed": seed, "increase": increase,
            "acceptance": 1 - increase, "kl": increase, "top1": 1.0, "seconds": 1.0}  # fmt: skip


@pytest.mark.parametrize("file", RIVALS, ids=lambda f: f.stem)
def test_a_rival_is_a_recipe_without_a_repair_of_ours(file: Path) -> None:
    recipe = load_recipe(file)
    assert recipe == Recipe().with_settings(compare.settings(str(file)))
    removal, _, rule = method(recipe.with_settings({"ratio": 0.5}))
    assert rule in ("uniform", "naee", "tod")
    assert recipe.reduce != "prune" or recipe.repair in ("none", "novice")
    assert removal.name in criteria()
    assert file.stem in file.read_text().split("--recipe", 1)[1]  # the command names itself


def test_every_published_criterion_has_a_recipe() -> None:
    named = {method(load_recipe(f).with_settings({"ratio": 0.5}))[0].name for f in RIVALS}
    for name in ("frequency", "ean", "reap", "man", "msan", "mone", "aimer", "easy-ep", "naee"):
        assert name in named


def test_relative_increases_rest_on_common_seeds() -> None:
    rows = [row("a", 0.5, 0, 0.2), row("a", 0.5, 1, 9.0), row("b", 0.5, 0, 0.4)]
    assert compare.relative(compare.cells_of(rows), "m", "a", "b", 0.5) == pytest.approx(0.5)
    assert compare.relative(compare.cells_of(rows), "m", "a", "c", 0.5) is None


def test_the_verdict_names_the_best_peer_and_the_worst_cell() -> None:
    rows = []
    for ratio, ours in ((0.25, 0.1), (0.5, 0.9)):
        rows += [row("default", ratio, s, ours) for s in (0, 1)]
        rows += [row(f"{p}/uniform", ratio, s, 2.0) for p in lab.PEERS for s in (0, 1)]
        rows += [row("mone/uniform", ratio, s, 1.0, "other") for s in (0, 1)]  # never complete
    rows = [r | {"increase": 1.0} if r["method"] == "ean/uniform" else r for r in rows]
    text = lab.verdict(rows)
    assert "1.0000 (ean)" in text
    assert "other" not in text
    assert (
        f"| geometric mean | | | | {math.sqrt(0.09):.3f} | | - | {math.sqrt(0.09) / 2:.3f}" in text
    )
    assert "| worst | | | | 0.900 | | - | 0.450 | |" in text


def test_texts_are_set_side_by_side_on_the_seeds_of_both() -> None:
    rows = []
    for seed, own in ((0, 0.1), (1, 0.2), (2, 9.0)):  # seed 2: not with the given text
        rows.append(row("default@self", 0.5, seed, 0.0))
        rows[-1] |= {"domains": {"a": own}, "unseen": {"b": own, "c": own + 0.3}}
        if seed < 2:
            rows.append(row("default", 0.5, seed, 0.0))
            rows[-1] |= {"domains": {"a": 0.1}, "unseen": {"b": 0.5, "c": 0.9}}
    rows.append(row("other", 0.5, 0, 0.0))  # measured without other domains
    lines = lab.texts(rows).splitlines()
    mine, given, together = lines[-3:]
    assert mine == "| m | 50 % | default@self | 0.1500 | 0.3000 | 0.4500 | 0.2500 | 0.500 | 2 |"
    assert given == "| m | 50 % | default | 0.1000 | 0.7000 | 0.9000 | 0.5000 | - | 2 |"
    assert together == "| geometric mean | | default@self | | | | | 0.500 | |"


def test_peers_with_the_same_repair_are_compared_on_both_kinds_of_domains() -> None:
    rows = []
    for seed in (0, 1):
        for name, seen, other in (
            ("default", 0.1, -0.1), ("default@self", 0.3, 0.2), ("reap/uniform+distill", 0.2, 0.5),
            ("mone/uniform+distill", 0.4, 0.4), ("mone/uniform", 0.0, 0.0),
        ):  # fmt: skip
            rows.append(row(name, 0.5, seed, 0.0))
            rows[-1] |= {"domains": {"a": seen, "b": seen + 0.2}, "unseen": {"c": other}}
    rows.append(rows[0] | {"seed": 2, "domains": {"a": 9.0}})  # the peers have no such seed
    lines = lab.same_repair(rows).splitlines()
    names = "default | default@self | mone/uniform+distill | reap/uniform+distill"
    assert names in lines[2]
    given, others, mean_given, mean_others = lines[-4:]
    assert given == (
        "| m | 50 % | given text's | 0.2000 | 0.4000 | 0.5000 | **0.3000** | 0.667 | 1.333 | 2 |"
    )
    assert others == (
        "| m | 50 % | others | -0.1000 | 0.2000 | **0.4000** | 0.5000 | - | 0.500 | 2 |"
    )
    assert mean_given.replace(" ", "") == "|geometricmean||giventext's|||||0.667|1.333||"
    assert mean_others.replace(" ", "") == "|geometricmean||others|||||-|0.500||"
    few = [r for r in rows if not r["method"].startswith("reap")]  # a peer is not there: no number
    few += [r | {"model": "n"} for r in rows]
    missing = lab.same_repair(few).splitlines()[4]
    assert missing == (
        "| m | 50 % | given text's | 0.2000 | 0.4000 | **0.5000** | - | 0.400 | 0.800 | 2 |"
    )


@pytest.mark.nightly
@pytest.mark.slow
def test_rows_tables_and_plot(tmp_path: Path) -> None:
    methods = ["mone/uniform+scale", "reap/uniform", str(RIVALS[0]), "frequency/evoesap",
               "frequency/uniform+merge", "taylor-sq/curves", "reap/uniform@self"]  # fmt: skip
    out = tmp_path / "rows.jsonl"
    given = [
        "--models", str(MODEL), "--calibration", str(CALIBRATION),
        "--heldout", str(HELDOUT), "--unseen", str(CALIBRATION), "--samples", "8", "--length", "48",
        "--heldout-samples", "8", "--agreement-samples", "4", "--ratios", "0.5",
        "--evaluations", "2", "-o", str(out), "--csv", str(tmp_path / "t.csv"),
        "--table", str(tmp_path / "t.md"), "--plot", str(tmp_path / "p.png"),
    ]  # fmt: skip
    rows = compare.main([*given, "--seeds", "1", "--methods", *methods])
    assert [r["method"] for r in rows] == [compare.called(m) for m in methods]
    for r in rows:
        assert r["loss"] - r["base"] == pytest.approx(r["increase"])
        assert 0 < r["acceptance"] < 1
        assert r["kl"] > 0
        assert sum(r["kept"]) == 180
    by = {r["method"]: r for r in rows}
    assert by["reap/uniform"]["kept"] == [30] * 6 == by["frequency/uniform+merge"]["kept"]
    assert by["taylor-sq/curves"]["predicted"] is not None
    assert {*by["reap/uniform"]["unseen"]} == {p.stem for p in CALIBRATION.glob("*.jsonl")}
    assert by["reap/uniform@self"]["unseen"] != by["reap/uniform"]["unseen"]
    assert by["reap/uniform@self"]["base"] == by["reap/uniform"]["base"]
    before, rival = out.read_text(), RIVALS[0].stem
    again = compare.main([*given, "--seeds", "2", "--methods", *methods[1:3]])
    assert out.read_text().startswith(before)  # nothing is measured twice
    assert [(r["method"], r["seed"]) for r in again[-2:]] == [
        ("reap/uniform", 1),
        (rival, 1),
    ]
    lines = list(csv.DictReader((tmp_path / "t.csv").read_text().splitlines()))
    assert {(x["method"], x["seeds"]) for x in lines} == {
        ("reap/uniform", "2"),
        (rival, "2"),
    }
    mean = sum(r["increase"] for r in again if r["method"] == "reap/uniform") / 2
    assert float(lines[0]["increase_mean"]) == pytest.approx(mean)
    assert f"{mean:.4f} ±" in (tmp_path / "t.md").read_text()
    assert (tmp_path / "p.png").read_bytes().startswith(b"\x89PNG")
