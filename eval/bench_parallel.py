"""Parallel efficiency of a collection: processes pinned to a core each, against one of them alone.

    python eval/make_full_size.py -o scaled --scale 4 --layers 6
    OMP_NUM_THREADS=1 torchrun --nproc_per_node 2 eval/bench_parallel.py --model scaled

Every process takes one core for itself (taskset's way, by its rank, `--cores` to choose). In one
run the first process collects from all batches alone while the others wait, then all collect from
their shares and reduce, in turn, after a warm-up of both. Efficiency is the time alone over N times
the time together; the figure is the median over the repeats. Target: 0.85 with two processes. On a
machine that others use, the load average says how far to trust it: a process that loses its core
for a moment holds up all. The second figure takes the CPU time of the busiest process instead of
the clock: it sees work done twice and unequal shares, and no waiting for a core or another process.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import time
from pathlib import Path

import psutil
import torch

from moe_fair.core.units import Statistics
from moe_fair.engines import processes as distributed
from moe_fair.engines.batch import Batch, Engine
from moe_fair.engines.processes import ALONE, Team
from moe_fair.moe.blocks import find_blocks
from moe_fair.moe.calibration_text import CalibrationSet, sample
from moe_fair.moe.checkpoint_source import Checkpoint
from moe_fair.moe.collector import ExpertCollector
from moe_fair.moe.engine_choice import start
from moe_fair.moe.text_sources import parse_source


def main() -> None:
    """Measure and let the first process print."""
    args = _arguments()
    team = distributed.current_team()
    core = args.cores[team.node_rank] if args.cores else team.node_rank
    os.sched_setaffinity(0, {core})
    torch.set_num_threads(1)
    source = Checkpoint(args.model)
    samples = args.batch_size * args.batches
    drawn = sample(
        [parse_source(args.text)], source.tokenizer(), samples=samples, length=args.length, seed=0
    )
    text = CalibrationSet(("all",), tuple((ids, 0) for ids, _ in drawn.sequences))
    batches = text.batches(args.batch_size)
    quiet = lambda *a: a[2]  # noqa: E731
    engine, model = start(source, args.engine, "float32", "cpu", quiet, team)
    if args.engine == "streaming":  # alone, the first process reads for itself
        alone, hollow = start(source, args.engine, "float32", "cpu", quiet)
    else:
        alone, hollow = engine, model
    rows = []
    for repeat in range(args.repeats + 1):
        single = timed(team, team.first, alone, hollow, source, batches, ALONE)
        together = timed(team, True, engine, model, source, batches, team)
        if repeat:
            rows.append({"alone": single, "together": together})
        if team.first:
            print(
                f"{single[0]:8.2f} s alone, {together[0]:8.2f} s together; "
                f"{single[1]:8.2f} and {together[1]:8.2f} of them computing",
                flush=True,
            )
    if team.first:
        print(
            f"{args.model}, {args.engine}: {len(batches)} batches of {args.batch_size} × "
            f"{args.length} tokens, {team.size} processes; load average "
            f"{psutil.getloadavg()[0]:.1f} on {psutil.cpu_count()} cores"
        )
        for i, what in enumerate(("by the clock", "by the busiest process's CPU time")):
            ratios = [r["alone"][i] / (team.size * r["together"][i]) for r in rows]
            print(
                f"efficiency {what}: {statistics.median(ratios):.3f} "
                f"(median of {len(ratios)}, {min(ratios):.3f}-{max(ratios):.3f})"
            )
        if args.json:
            args.json.write_text(json.dumps(rows) + "\n")
    distributed.finish()


def timed(
    everybody: Team,
    working: bool,
    engine: Engine,
    model: torch.nn.Module,
    source: Checkpoint,
    batches: list[Batch],
    team: Team,
) -> tuple[float, float]:
    """Seconds from a common start until the first process has the statistics; the CPU's of them."""
    everybody.gather(None)
    started, cpu = time.perf_counter(), time.process_time()
    if working:
        collect(engine, model, source, team.share(batches, lambda b: b.mask.numel()), team)
    cpu = time.process_time() - cpu
    busiest = max(everybody.gather(cpu))
    return time.perf_counter() - started, busiest


def collect(
    engine: Engine, model: torch.nn.Module, source: Checkpoint, share: list[Batch], team: Team
) -> Statistics | None:
    """A whole collection with every statistic."""
    collector = ExpertCollector(find_blocks(model), source.groups, ("all",))
    with collector:
        engine.run(share, collector)
    return team.reduce(collector.statistics() if share else None)


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--model", default="eval/tiny-qwen2-moe")
    parser.add_argument("--text", default="eval/text/calibration")
    parser.add_argument("--engine", choices=("resident", "streaming"), default="resident")
    parser.add_argument("--batch-size", type=int, default=2)
    parser.add_argument("--batches", type=int, default=8)
    parser.add_argument("--length", type=int, default=256)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--cores", type=int, nargs="+", help="one for each process")
    parser.add_argument("--json", type=Path)
    return parser.parse_args()


if __name__ == "__main__":
    main()
