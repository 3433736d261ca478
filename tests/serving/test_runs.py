"""What checks of engines have found, against the table of engines that is read by the commands."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
from places import ROOT

from moe_fair.core.engine_facts import engines

sys.path.insert(0, str(ROOT / "eval" / "serving"))
import runs

CLOSE = 1e-4  # of a token's log-likelihood, float32; the largest that was seen is 3e-5


def agrees(r: dict[str, Any]) -> bool:
    return r["greedy_equal"] and r["largest_difference"] < CLOSE


@pytest.mark.parametrize("engine", ["vllm", "mlx", "llama.cpp"])
def test_the_table_of_engines_says_what_was_run(engine: str) -> None:
    rows = [r for r in runs.read() if r["engine"] == engine and "greedy_equal" in r]
    facts = engines()[engine]
    equal = {r["family"] for r in rows if agrees(r) and _has_equal_counts(r)}
    unequal = {r["family"] for r in rows if agrees(r) and r["counts"] == "unequal" and not r["how"]}
    assert {*facts["equal"]["run"]} == equal
    assert {*facts["unequal"].get("run", ())} == unequal
    # node-llama-cpp brings a llama.cpp of its own
    built = [r for r in rows if not r["how"].startswith("node-llama-cpp")]
    assert {r["version"] for r in built} == {facts["tested"]["versions"]}
    assert max(r["date"] for r in rows) == facts["tested"]["date"]


def _has_equal_counts(r: dict[str, Any]) -> bool:
    return r["counts"] in ("unpruned", "equal") or r["how"] == "padded"


def test_every_unequal_result_agrees_with_what_it_is_held_against() -> None:
    found = [r for r in runs.read() if "greedy_equal" in r and r["counts"] == "unequal"]
    assert len(found) >= 16
    assert [r for r in found if not agrees(r)] == []


def test_a_pruned_head_drafts_what_we_draft_where_the_original_does() -> None:
    rows = [r for r in runs.read() if "drafted" in r]

    def same(r: dict[str, Any]) -> bool:
        return r["tokens_equal"] and all(len({*r[n]}) == 1 for n in ("drafted", "accepted"))

    sound = {r["family"] for r in rows if r["counts"] == "unpruned" and same(r)}
    assert sound
    for form in ("equal", "unequal"):
        found = [r for r in rows if r["counts"] == form and r["family"] in sound]
        assert {r["family"] for r in found} == sound
        assert [r for r in found if not same(r)] == []


def test_quantised_results_are_those_of_the_table() -> None:
    rows = [r for r in runs.read() if "losses" in r]
    facts = engines()["llm-compressor"]
    # node-llama-cpp brings a llama.cpp of its own
    built = [r for r in rows if not r["how"].startswith("node-llama-cpp")]
    assert {r["version"] for r in built} == {facts["tested"]["versions"]}
    for form in ("equal", "unequal"):
        found = [r for r in rows if r["counts"] == form]
        assert {r["family"] for r in found} == {*facts[form]["run"]}
        assert {r["how"] for r in found} == {"FP8_DYNAMIC", "W4A16"}
        assert all(abs(a - b) < 0.02 for r in found for a, b in [r["losses"][:2]])


def test_a_row_takes_the_place_of_the_one_that_it_repeats(tmp_path: Path) -> None:
    path = tmp_path / "runs.jsonl"
    one = {
        "engine": "b",
        "family": "f",
        "counts": "unequal",
        "how": "",
        "against": "t",
        "date": "1",
    }
    runs.keep([one], path)
    runs.keep([one | {"date": "2"}, one | {"how": "x"}, one | {"engine": "a"}], path)
    found = runs.read(path)
    assert [(r["engine"], r["how"], r["date"]) for r in found] == [
        ("a", "", "1"), ("b", "", "2"), ("b", "x", "1"),
    ]  # fmt: skip
