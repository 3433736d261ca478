"""kill -9 at any moment: the rerun ends with the same bytes, and nothing half stands there."""

from __future__ import annotations

import time
from pathlib import Path

import pytest
from places import CALIBRATION, MODEL
from processes import Python, python

pytestmark = pytest.mark.slow  # fifteen processes

TEXT = [
    "-c", str(CALIBRATION), "--samples", "24", "--length", "64", "--batch-size", "2",
    "--save-every", "2",
]  # fmt: skip
COMMAND = ["-m", "moe_fair"]
CALIBRATE = [*COMMAND, "calibrate", str(MODEL), *TEXT]
RUN = [*COMMAND, "prune", str(MODEL), "--experts", "40", *TEXT, "--repair", "scale"]


def bytes_of(folder: Path) -> dict[str, bytes]:
    return {str(f.relative_to(folder)): f.read_bytes() for f in folder.rglob("*") if f.is_file()}


def finish(output: Path, engine: str, command: list[str] = RUN) -> str:
    done = python(*command, "--engine", engine, "-o", output)
    assert done.returncode == 0, done.stderr
    return done.stderr


def kill_once(output: Path, engine: str, wait_for: str, command: list[str] = RUN) -> None:
    """Start, wait until a path matching the pattern appears beside the output, kill -9."""
    child = Python([*command, "--engine", engine, "-o", output], Path("/dev/null"))
    give_up = time.monotonic() + 240
    while not list(output.parent.glob(wait_for)) and child.poll() is None:
        assert time.monotonic() < give_up, f"{wait_for} never appeared"
        time.sleep(0.002)
    child.kill()
    child.wait()


CALIBRATING, REPAIRING, CUTTING = (
    [
        "killed.calibrating/chunk-00000/*.safetensors",
        "killed.calibrating/chunk-00003/*.safetensors",
    ],
    ["killed.calibrating/repair/layer-00002.safetensors"],
    ["killed.partial/model.safetensors"],
)


@pytest.mark.parametrize(
    ("engine", "moments"),
    [
        ("resident", [CALIBRATING[1], *CUTTING]),
        pytest.param("resident", [*CALIBRATING, *REPAIRING, *CUTTING], marks=pytest.mark.nightly),
        pytest.param("streaming", [CALIBRATING[1], *CUTTING], marks=pytest.mark.nightly),
    ],
)
def test_a_killed_run_goes_on(tmp_path: Path, engine: str, moments: list[str]) -> None:
    finish(tmp_path / "whole", engine)
    expected = bytes_of(tmp_path / "whole")
    output = tmp_path / "killed"
    for moment in moments:
        kill_once(output, engine, moment)
        assert not output.exists()
    said = finish(output, engine)
    assert "6 of 6 chunks were done before" in said
    assert bytes_of(output) == expected
    assert sorted(p.name for p in tmp_path.iterdir()) == ["killed", "whole"]


@pytest.mark.nightly
def test_a_killed_healing_goes_on(tmp_path: Path) -> None:
    """On one thread, bit for bit; killed as the original speaks, and in the midst of the steps."""
    heal = [*RUN, "--heal", "9000"]
    finish(tmp_path / "whole", "resident", heal)
    expected = bytes_of(tmp_path / "whole")
    for moment in ("original-continuations-0-of-1.safetensors", "state.safetensors"):
        kill_once(tmp_path / "killed", "resident", f"killed.calibrating/heal/{moment}", heal)
        assert not (tmp_path / "killed").exists()
    finish(tmp_path / "killed", "resident", heal)
    assert bytes_of(tmp_path / "killed") == expected
    assert sorted(p.name for p in tmp_path.iterdir()) == ["killed", "whole"]


@pytest.mark.nightly
def test_chunks_of_other_settings_are_passed_over(tmp_path: Path) -> None:
    output = tmp_path / "out"
    kill_once(output, "resident", "out.calibrating/chunk-00001/*.safetensors", CALIBRATE)
    done = python(*CALIBRATE, "--seed", "1", "-o", output)
    assert done.returncode == 0
    assert "going on" not in done.stderr
    damaged = tmp_path / "again"
    kill_once(damaged, "resident", "again.calibrating/chunk-00002/*.safetensors", CALIBRATE)
    file = damaged.with_name("again.calibrating") / "chunk-00000" / "statistics.safetensors"
    file.write_bytes(file.read_bytes()[:100])
    assert "going on" in finish(damaged, "resident", CALIBRATE)
    fresh = tmp_path / "fresh"
    kill_once(fresh, "resident", "fresh.calibrating/chunk-00001/*.safetensors", CALIBRATE)
    done = python(*CALIBRATE, "--fresh", "-o", fresh)
    assert done.returncode == 0, done.stderr
    assert "going on" not in done.stderr
    made = "statistics.safetensors"
    assert (damaged / made).read_bytes() == (fresh / made).read_bytes()
