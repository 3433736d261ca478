"""Signals at random moments of `moe-fair prune`: does the same command end with the same bytes?

    python eval/signals.py --count 100 --seed 0

Runs the default `prune` on the reference model with little text, once undisturbed. Then, `--count`
times: starts it, sends SIGINT, SIGTERM or SIGKILL (in turn) at a random moment of the run, a third
of the moments after the line "repairing" has appeared, runs the same command again to its end, and
compares every file but the reports with those of the undisturbed run. Processes are forked from one
that has imported torch, so that moments fall into the run and not into imports; they have their own
pid and streams and end by their own code. A line for each moment; exit code 1 where anything but
the expected was seen, whose folder then stays.
"""

from __future__ import annotations

import argparse
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from tempfile import mkdtemp

ROOT = Path(__file__).parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

from processes import Python  # noqa: E402

SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGKILL)
COMMAND = [
    "-m", "moe_fair", "prune", ROOT / "eval" / "tiny-qwen2-moe", "--experts", "40",
    "-c", ROOT / "eval" / "text" / "calibration", "--samples", "8", "--length", "64",
    "--batch-size", "2", "--save-every", "1", "-o",
]  # fmt: skip
REPAIRING = "repairing"
SECONDS = 600.0  # for one run


def main() -> None:
    """See above."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--count", type=int, default=100, help="moments")
    parser.add_argument("--seed", type=int, default=0, help="draws them")
    options = parser.parse_args()
    os.environ["HF_HUB_OFFLINE"] = "1"
    os.environ["OMP_NUM_THREADS"] = "1"
    draw = random.Random(options.seed)
    folder = Path(mkdtemp(prefix="signals-"))
    whole = folder / "whole" / "out"
    whole.parent.mkdir()
    early, late = undisturbed(whole)
    print(f"undisturbed: {early:.1f} s to {REPAIRING!r}, {late:.1f} s after it", flush=True)
    bad = 0
    for i in range(options.count):
        number, repairing = SIGNALS[i % 3], i // 3 % 3 == 0
        where = folder / f"{i:03d}"
        after = draw.uniform(0, late if repairing else early + late)
        found = disturbed(where, number, after, repairing)
        wrong = found or compare(whole, where / "out")
        bad += bool(wrong)
        moment = f"{after:5.2f} s after {REPAIRING!r}" if repairing else f"{after:5.2f} s"
        said = last_line(where / "first")
        print(f"{i:3d} {number.name:7} {moment:27} {wrong or 'same'} [{said}]", flush=True)
        if not wrong:
            shutil.rmtree(where)
    print(f"{options.count - bad} of {options.count} ended with the bytes of the undisturbed run")
    if bad:
        print(f"the others are in {folder}")
        sys.exit(1)
    shutil.rmtree(folder)


def undisturbed(output: Path) -> tuple[float, float]:
    """Run once; seconds to the line that says that the repair begins, and from there to the end."""
    log = output.with_name("log")
    started = time.monotonic()
    running = Python([*COMMAND, output], log)
    wait_for_line(running, log)
    repairing = time.monotonic()
    if running.wait(SECONDS) != 0:
        sys.exit(f"the undisturbed run failed: {log.read_text()}")
    return repairing - started, time.monotonic() - repairing


def wait_for_line(running: Python, log: Path) -> None:
    """Until the repair begins, or the run has ended."""
    give_up = time.monotonic() + SECONDS
    while REPAIRING not in log.read_text() and running.poll() is None:
        if time.monotonic() > give_up:
            sys.exit(f"{REPAIRING!r} never appeared in {log}")
        time.sleep(0.005)


def disturbed(folder: Path, number: signal.Signals, after: float, repairing: bool) -> str:
    """A run that gets a signal, and the same command again; what was not as it should be."""
    folder.mkdir()
    output, log = folder / "out", folder / "first"
    running = Python([*COMMAND, output], log)
    if repairing:
        wait_for_line(running, log)
    time.sleep(after)
    running.kill(number)
    try:
        code = running.wait(60)
    except subprocess.TimeoutExpired:
        running.kill()
        return "still runs a minute after the signal"
    text = log.read_text()
    # while our own modules are being imported, Python ends by itself
    early = ", in main" not in text if "Traceback" in text else not text
    if "Traceback" in text and not early:
        return "a traceback"
    # a run may also have ended before the signal
    if code not in (0, 128 + number, -number, *((1,) if early else ())):
        return f"exit code {code}"
    if code == 0 and not output.exists():
        return "exit code 0 and no result"
    if output.exists():  # its last step was done: the same command would refuse to write there
        return ""
    again = Python([*COMMAND, output], folder / "again")
    if (code := again.wait(SECONDS)) != 0:
        return f"the same command ends with {code}: {last_line(folder / 'again')}"
    left = sorted(p.name for p in folder.iterdir() if p.name not in ("first", "again", "out"))
    return f"left over: {', '.join(left)}" if left else ""


def compare(whole: Path, other: Path) -> str:
    """The first file that differs or is missing, but for the reports; empty where none does."""
    names = {p.relative_to(whole) for p in whole.rglob("*") if p.is_file()}
    others = {p.relative_to(other) for p in other.rglob("*") if p.is_file()}
    if names != others:
        return f"other files: {sorted(map(str, names ^ others))}"
    for name in sorted(names):
        if name.suffix != ".html" and (whole / name).read_bytes() != (other / name).read_bytes():
            return f"{name} differs"
    return ""


def last_line(log: Path) -> str:
    """The last thing that a run said."""
    lines = log.read_text().strip().splitlines()
    return lines[-1][:90] if lines else "nothing said yet"


if __name__ == "__main__":
    main()
