"""The scripts behind the figures on digits, at a fraction of their size."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
from places import ROOT
from processes import python

pytestmark = pytest.mark.slow  # about a minute


def run(script: str, *arguments: object) -> str:
    paths = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = python(ROOT / "eval" / script, *arguments, env=paths)
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout


@pytest.mark.nightly
def test_trained_pruned_and_ranked(tmp_path: Path) -> None:
    nets, table, oracle = tmp_path / "nets", tmp_path / "table.jsonl", tmp_path / "oracle.jsonl"
    small = ["--nets", "vgg_small", "--seeds", "1", "--epochs", "2", "-o", nets]
    first = run("train_digits.py", *small)
    assert first.startswith("vgg_small seed 0: top-1 9"), first  # 90 % or more after two epochs
    assert run("train_digits.py", *small) == first  # read, not trained again

    asked = ["--nets", nets, "--methods", "l1/uniform", "u-score/tod", "--ratios", "0.5"]
    screen = run("digits_table.py", *asked, "--epochs", "1", "-o", table)
    rows = [json.loads(line) for line in table.read_text().splitlines()]
    assert [r["method"] for r in rows] == ["l1/uniform", "u-score/tod"]
    assert all(r["parameters"] < 0.5 and r["tuned"] > r["cut"] for r in rows)
    tuned = f"{100 * rows[0]['tuned']:.2f} ± 0.00"
    line = next(x for x in screen.splitlines() if x.startswith("| l1/uniform"))
    assert tuned in line
    again = run("digits_table.py", *asked, "--epochs", "1", "-o", table)
    assert len(table.read_text().splitlines()) == 2  # nothing was measured twice
    assert line in again

    asked = ["--nets", nets, "--methods", "taylor-fo", "--target", "operations", "--ratios", "0.4"]
    fast = ["--units-per-step", "60", "--minibatches", "3", "--epochs", "1", "-o", table]
    screen = run("digits_table.py", *asked, *fast)
    [row] = [json.loads(x) for x in table.read_text().splitlines()[2:]]
    assert row["operations"] <= 0.6
    assert row["steps"] > 1
    assert f"{row['tuned'] / row['dense']:.1%}" in screen
    assert "operations removed" in screen
    assert "channels removed" in screen

    few = ["--scored", "128", "--oracle-images", "16"]
    screen = run("digits_table.py", "--oracle", "--nets", nets, *few, "-o", oracle)
    [row] = [json.loads(x) for x in oracle.read_text().splitlines()]
    assert row["taylor-sq"]["squared"]["spearman"] > row["random"]["squared"]["spearman"] + 0.3
    assert row["taylor-logits"]["change of these"]["pearson"] > 0.9
    assert "| taylor-sq |" in screen


@pytest.mark.nightly
def test_u_score_benchmark_runs_without_the_peer() -> None:
    said = run("bench_uscore.py", "--images", "40", "--layers", "2", "--memory", "64", "8")
    lines = said.splitlines()
    assert len(lines) == 2
    assert all("s CPU" in x and "MiB" in x for x in lines)
