"""`moe-fair check`, and plans and results for engines (`--for`)."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from places import MODEL

from moe_fair.cli import main
from moe_fair.core.plan import Plan
from moe_fair.core.recipe import Recipe
from moe_fair.pipelines.rivals import rivals

Fails = Callable[..., str]


def run(*arguments: object) -> None:
    with pytest.raises(SystemExit) as stop:
        main([str(a) for a in arguments])
    assert stop.value.code == 0


def planned(path: Path, *arguments: object) -> Plan:
    run("plan", *arguments, "-o", path)
    return Plan.load(path)


def test_any_checkpoint_is_checked(capsys: pytest.CaptureFixture[str], fails: Fails) -> None:
    run("check", MODEL)
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].split() == ["engine", "served", "versions", "how"]
    assert any(x.startswith("vLLM") and f"vllm serve {MODEL}" in x for x in lines)
    run("check", MODEL, "--json")
    found = json.loads(capsys.readouterr().out)
    assert (found["experts"], found["equal"]) == ([60], True)
    assert {e["engine"] for e in found["engines"]} >= {"vllm", "llama.cpp", "transformers"}
    assert "config.json cannot be read" in fails("check", MODEL.parent)


def test_equal_counts_where_an_engine_takes_no_other(
    statistics_folder: Path, tmp_path: Path, fails: Fails
) -> None:
    path, stats = tmp_path / "plan.json", statistics_folder
    made = planned(path, stats, "--ratio", "0.3", "--for", "vllm,llama.cpp")
    assert {len(g.kept) for g in made.groups} == {42}
    assert (made.allocator, made.recipe["serve"]) == ("uniform", ["vllm", "llama.cpp"])
    assert not planned(path, stats, "--ratio", "0.3", "--for", "vllm").uniform
    text = fails("plan", stats, "--experts", "40.5", "--for", "llama.cpp")
    assert "--for llama.cpp: --experts 40.5" in text
    assert "is 40 and 41" in text
    text = fails("plan", stats, "--experts", "40", "--for", "llama.cpp", "--method", "reap/global")
    assert "llama.cpp (--for) serves equal ones alone" in text
    assert "no engine 'vlm'" in fails("plan", stats, "--experts", "40", "--for", "vlm")
    shared = planned(path, stats, "--ratio", "0.3", "--for", "vllm:ep=8")
    assert not shared.uniform
    assert {len(g.kept) % 8 for g in shared.groups} == {0}
    text = fails("plan", stats, "--experts", "40", "--for", "vllm:tp=8")
    assert "--for vllm:tp=8: write vllm, or vllm:ep=8" in text


def test_refused_before_anything_is_measured(
    tmp_path: Path, fails: Fails, settings: dict[str, Any], statistics_folder: Path
) -> None:
    out = tmp_path / "out"
    text = ("-c", settings["calibration"], "--samples", 8, "--length", 64)
    asked = ("prune", MODEL, "-o", out, *text, "--for", "llama.cpp")
    assert "is 40 and 41" in fails(*asked, "--experts", "40.5")
    assert "--allocate tod gives layers" in fails(*asked, "--experts", 40, "--method", "fair/tod")
    # a plan of before
    planned(tmp_path / "plan.json", statistics_folder, "--experts", "40")
    line = fails("prune", MODEL, "-o", out, "--plan", tmp_path / "plan.json", "--repair", "none",
                 "--for", "llama.cpp")  # fmt: skip
    assert "--for llama.cpp: the plan is not served" in line
    assert not out.exists()


def test_rivals_are_those_with_equal_counts() -> None:
    assert any(not n.endswith("/uniform") for n in rivals(Recipe(experts=4)))
    found = rivals(Recipe(experts=4, serve=("llama.cpp",)))
    assert len(found) > 2
    assert all(n.endswith("/uniform") for n in found)


@pytest.mark.slow
def test_results_say_who_serves_them(
    tmp_path: Path, statistics_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    asked = ("prune", MODEL, "-o", out, "--stats", statistics_folder, "--repair", "none",
             "--for", "llama.cpp", "--experts", 40)  # fmt: skip
    run(*asked, "--dry-run", "--json")
    found = json.loads(capsys.readouterr().out)
    assert "llama.cpp: yes" in found["checks"]["served by"]
    run(*asked)
    assert "vllm serve" in capsys.readouterr().out
    assert json.loads((out / "config.json").read_text())["num_experts"] == 40
    run("report", out, "--format", "md")
    assert "## Serving" in (out / "moe_fair" / "report.md").read_text()
    assert "serve:\n- llama.cpp" in (out / "moe_fair" / "recipe.yaml").read_text()
