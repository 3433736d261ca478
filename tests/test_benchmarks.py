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
