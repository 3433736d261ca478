"""Cutting a checkpoint on disk: speed against `cp` of the same bytes, and memory.

    python eval/make_full_size.py -o full && python eval/bench_surgery.py --model full

A random third of every layer's experts leaves (unequal counts). The cut and a `cp -r` of its result
alternate, each ended by a sync; the figure is the median of the ratios. Memory is the peak of the
process's anonymous pages beyond what it had before the cut.
"""

from __future__ import annotations

import argparse
import os
import shutil
import statistics
import subprocess
import threading
import time
from collections.abc import Callable
from pathlib import Path

import psutil
import torch
from bench_full_size import anonymous

from moe_fair.moe.checkpoint_source import Checkpoint
from moe_fair.moe.checkpoint_writer import write_model


def timed(work: Callable[[], object]) -> float:
    """Wall seconds until the bytes are on the disk."""
    os.sync()
    started = time.perf_counter()
    work()
    os.sync()
    return time.perf_counter() - started


def peak_of(work: Callable[[], object]) -> int:
    """Most anonymous bytes that the work adds to this process."""
    process, done = psutil.Process(), threading.Event()
    before = most = anonymous(process)

    def watch() -> None:
        nonlocal most
        while not done.wait(0.02):
            most = max(most, anonymous(process))

    thread = threading.Thread(target=watch)
    thread.start()
    work()
    done.set()
    thread.join()
    return most - before


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--model", required=True)
    parser.add_argument("--repeats", type=int, default=3)
    args = parser.parse_args()
    source = Checkpoint(args.model)
    generator = torch.Generator().manual_seed(0)
    kept = {}
    for i, b in enumerate(source.blocks):
        count = b.num_experts * 2 // 3 + i % 3 - 1
        ids = torch.randperm(b.num_experts, generator=generator)[:count]
        kept[b.name] = sorted(ids.tolist())
    out, copy = Path(args.model + ".cut"), Path(args.model + ".copy")

    def cut() -> None:
        shutil.rmtree(out, ignore_errors=True)
        write_model(source, kept, out)

    def duplicate() -> None:
        shutil.rmtree(copy, ignore_errors=True)
        subprocess.run(["cp", "-r", str(out), str(copy)], check=True)

    memory = peak_of(cut)
    size = sum(f.stat().st_size for f in out.iterdir())
    pairs = [(timed(cut), timed(duplicate)) for _ in range(args.repeats)]
    ratio = statistics.median(c / w for w, c in pairs)
    w, c = (statistics.median(x) for x in zip(*pairs, strict=True))
    print(f"{size / 1e9:.2f} GB written in {w:.1f} s, cp {c:.1f} s: {ratio:.2f} of cp's speed")
    print(f"peak anonymous memory beyond the start: {memory / 1e6:.0f} MB")
    shutil.rmtree(out)
    shutil.rmtree(copy)


if __name__ == "__main__":
    main()
