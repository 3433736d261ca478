"""The benchmarks run at a tiny size and fill their tables. What they say is for eval/RESULTS.md."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from places import ROOT
from processes import python

pytestmark = pytest.mark.slow


@pytest.mark.nightly
def test_on_a_device(tmp_path: Path) -> None:
    script = ["eval/bench_device.py", "--json", tmp_path / "json"]
    size = ["--repeats", "1", "--batches", "1", "--batch-size", "2", "--length", "32"]
    done = python(*script, *size, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    found = json.loads((tmp_path / "json").read_text())
    assert done.stdout.startswith(found.pop("device"))
    assert len(found) == 7
    assert all(v["tokens_per_second"] > 0 for v in found.values())
    # every watched pass does more than the bare one, and the streaming one more than any
    assert found["Taylor, streaming"]["tokens_per_second"] == min(
        v["tokens_per_second"] for v in found.values()
    )


@pytest.mark.nightly
def test_the_whole_command_on_a_device(tmp_path: Path) -> None:
    size = ["--samples", "64", "--length", "32", "--experts", "40"]
    rates = ["--peak", "1e12", "--bandwidth", "1e10"]
    done = python("eval/bench_prune.py", *size, *rates, "--json", tmp_path / "json", cwd=ROOT)
    assert done.returncode == 0, done.stderr
    stages = {s["stage"]: s for s in json.loads((tmp_path / "json").read_text())["stages"]}
    assert list(stages) == ["start", "collection", "trials", "repair", "cut and verify"]
    assert all(s["seconds"] > 0 for s in stages.values())
    for name in ("collection", "trials", "repair"):
        assert stages[name]["tokens_per_second"] > 0
        assert 0 < stages[name]["of_peak"] < 10
        assert f"| {name} |" in done.stdout
    assert stages["repair"]["of_bandwidth"] > 0


@pytest.mark.nightly
def test_in_parallel(tmp_path: Path) -> None:
    script = [
        sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2",
        "eval/bench_parallel.py", "--json", str(tmp_path / "json"),
    ]  # fmt: skip
    size = ["--repeats", "1", "--batches", "4", "--batch-size", "1", "--length", "32"]
    done = subprocess.run([*script, *size], cwd=ROOT, capture_output=True, text=True, check=True)
    assert "efficiency by the clock" in done.stdout
    [row] = json.loads((tmp_path / "json").read_text())
    assert all(seconds > 0 for pair in row.values() for seconds in pair)


@pytest.mark.nightly
def test_a_version_beside_another(tmp_path: Path) -> None:
    """This one beside itself: the same losses and bytes, and about the same time."""
    size = ["--samples", "64", "--length", "32", "--heldout", "8", "--seeds", "0"]
    script = ["eval/bench_repair.py", "--before", ROOT, "--json", tmp_path / "json"]
    done = python(*script, *size, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    [row] = json.loads((tmp_path / "json").read_text())
    assert row["same"]
    assert row["losses"]["before"] == row["losses"]["now"]
    assert 0.3 < row["seconds"]["now"] / row["seconds"]["before"] < 3
