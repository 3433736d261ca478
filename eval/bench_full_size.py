"""Run a command and sample its memory: does pruning a model larger than memory stay small?

    python eval/make_full_size.py -o full
    python eval/bench_full_size.py -- moe-fair prune full --experts 40 --engine streaming \\
        -c eval/text/calibration --samples 8 --length 512 -o full-40

Prints the command's own lines as they come, then wall time and the peak of anonymous memory
(RssAnon of the process and its children; pages of mapped files do not count, the kernel can drop
them). `--json FILE` writes the figures and the samples.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import threading
import time
from pathlib import Path

import psutil


def anonymous(process: psutil.Process) -> int:
    """Bytes of anonymous memory of a process and its children now."""
    total = 0
    for p in [process, *process.children(recursive=True)]:
        try:
            status = Path(f"/proc/{p.pid}/status").read_text()
        except OSError:  # it has ended
            continue
        lines = [line.split() for line in status.splitlines() if line.startswith("RssAnon")]
        total += sum(int(words[1]) * 1024 for words in lines)
    return total


def main() -> None:
    """Run, sample, print."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--every", type=float, default=0.2, help="seconds between samples")
    parser.add_argument("--json", type=Path)
    parser.add_argument("command", nargs=argparse.REMAINDER)
    args = parser.parse_args()
    command = args.command[1:] if args.command[:1] == ["--"] else args.command
    started = time.perf_counter()
    child = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    watched = psutil.Process(child.pid)
    samples: list[tuple[float, int]] = []

    def watch() -> None:
        while child.poll() is None:
            try:
                samples.append((round(time.perf_counter() - started, 2), anonymous(watched)))
            except psutil.NoSuchProcess:
                return
            time.sleep(args.every)

    thread = threading.Thread(target=watch)
    thread.start()
    assert child.stdout is not None
    for line in child.stdout:
        print(f"{time.perf_counter() - started:8.1f} s  {line}", end="", flush=True)
    code = child.wait()
    thread.join()
    wall = time.perf_counter() - started
    when, peak = max(samples, key=lambda s: s[1])
    print(f"exit {code}, {wall:.1f} s wall, peak anonymous {peak / 1e9:.2f} GB at {when:.0f} s")
    if args.json:
        args.json.write_text(json.dumps({"wall_s": wall, "peak_bytes": peak, "samples": samples}))
    raise SystemExit(code)


if __name__ == "__main__":
    main()
