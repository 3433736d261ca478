"""Collection on one device: tokens per second against the bare model, and peak memory.

    python eval/make_full_size.py -o full          # the real shape of Qwen1.5-MoE-A2.7B, 28.6 GB
    python eval/bench_device.py --model full --dtype bfloat16
    python eval/bench_device.py --repeats 1        # the reference model, on whatever is here

Bare: frozen weights, forward alone, or forward and backward down to the embeddings' output. The
variants run in turn after a warm-up; ratios are medians over the repeats, of a variant's time to
its bare counterpart's in the same round. Targets: 1.10 for forward statistics, 1.15 with Taylor.
Peak memory is the device's own, the model's weights included; on a CPU, which keeps no such
record, there is a dash.
"""

from __future__ import annotations

import argparse
import gc
import json
import math
import os
import platform
import statistics
from collections.abc import Callable
from pathlib import Path

import torch
from bench_collect import bare, timed

from moe_fair.engines.batch import Batch, Engine
from moe_fair.engines.device import pick_device
from moe_fair.engines.resident import ResidentEngine
from moe_fair.moe.blocks import find_blocks
from moe_fair.moe.calibration_text import CalibrationSet, sample
from moe_fair.moe.checkpoint_source import Checkpoint
from moe_fair.moe.collector import ExpertCollector
from moe_fair.moe.engine_choice import start
from moe_fair.moe.statistics import collecting, unasked
from moe_fair.moe.text_sources import parse_source

# name -> (engine, checkpointing, backward, counterfactual; None: nobody watches)
VARIANTS: dict[str, tuple[str, bool, bool, bool | None]] = {
    "bare forward": ("resident", False, False, None),
    "forward statistics": ("resident", False, False, False),
    "bare forward + backward": ("resident", False, True, None),
    "Taylor": ("resident", False, True, False),
    "Taylor and counterfactual": ("resident", False, True, True),
    "Taylor, checkpointed": ("resident", True, True, False),
    "Taylor, streaming": ("streaming", False, True, False),
}


def main() -> None:
    """Measure and print one table."""
    args = _arguments()
    device = pick_device(args.device)
    source = Checkpoint(args.model)
    samples = args.batch_size * args.batches
    drawn = sample(
        [parse_source(args.text)], source.tokenizer(), samples=samples, length=args.length, seed=0
    )
    text = CalibrationSet(("all",), tuple((ids, 0) for ids, _ in drawn.sequences))
    batches = text.batches(args.batch_size)
    name = torch.cuda.get_device_name() if device.type == "cuda" else _processor()
    print(f"{name}, torch {torch.__version__}, {torch.get_num_threads()} threads")
    print(
        f"{args.model}, {args.dtype}: {text.tokens:,} tokens, {args.batch_size} × {args.length}\n"
    )
    times: dict[str, list[float]] = {v: [] for v in VARIANTS}
    peaks: dict[str, int | None] = {}
    # what can share a loaded model runs in turn; the streaming engine comes with its own
    for engine in args.engines:
        variants = [v for v, how in VARIANTS.items() if how[0] == engine]
        ready = _load(source, args, variants)
        for repeat in range(args.repeats + 1):
            for v in variants:
                work, model = ready(v, source, batches)
                _forget(device)
                if device.type == "cuda":
                    torch.cuda.reset_peak_memory_stats()
                took = timed(work, model)
                if repeat:
                    times[v].append(took)
                peaks[v] = torch.cuda.max_memory_allocated() if device.type == "cuda" else None
        del ready, work, model
        _forget(device)
    found = {}
    print("| variant | tokens/s | ratio | to | peak device memory |\n|---|---|---|---|---|")
    for v, (_, _, backward, watched) in VARIANTS.items():
        if not times[v]:
            continue
        base = "bare forward + backward" if backward else "bare forward"
        pairs = zip(times[v], times[base], strict=bool(times[base]))  # not asked for: no ratio
        ratio = statistics.median([a / b for a, b in pairs] or [math.nan])
        speed = text.tokens / statistics.median(times[v])
        found[v] = {"tokens_per_second": speed, "ratio": ratio, "peak_bytes": peaks[v]}
        told = f"{ratio:.3f} | {base}" if watched is not None else "- | -"
        memory = "-" if (peak := peaks[v]) is None else f"{peak / 1e9:.2f} GB"
        print(f"| {v} | {speed:,.0f} | {told} | {memory} |")
    if args.json:
        args.json.write_text(json.dumps({"device": name, **found}, indent=1) + "\n")


Ready = Callable[[str, Checkpoint, list[Batch]], tuple[Callable[[], None], torch.nn.Module]]


def _load(source: Checkpoint, args: argparse.Namespace, variants: list[str]) -> Ready:
    """A function that makes a variant's work on one loaded model."""
    engine, model = start(
        source, VARIANTS[variants[0]][0], args.dtype, args.device, lambda *a: a[2]
    )
    model.set_experts_implementation("grouped_mm")
    engines: dict[str, Engine] = {}
    for v in variants:
        engines[v] = engine
        if VARIANTS[v][1]:
            engines[v] = ResidentEngine(model, checkpointing=True)

    def ready(
        v: str, source: Checkpoint, batches: list[Batch]
    ) -> tuple[Callable[[], None], torch.nn.Module]:
        _, _, backward, counterfactual = VARIANTS[v]
        if counterfactual is None:
            return lambda: bare(model, batches, backward), model
        return (
            lambda: watch(engines[v], model, source, batches, backward, counterfactual),
            model,
        )

    return ready


def watch(
    engine: Engine,
    model: torch.nn.Module,
    source: Checkpoint,
    batches: list[Batch],
    backward: bool,
    counterfactual: bool,
) -> None:
    """A whole collection."""
    without = () if counterfactual else ("counterfactual",)
    wanted = collecting(unasked("always", "usual"), without, backward=backward)
    collector = ExpertCollector(find_blocks(model), source.groups, ("all",), wanted)
    with collector:
        engine.run(batches, collector, backward=backward)


def _forget(device: torch.device) -> None:
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()


def _processor() -> str:
    """The CPU's name, where the system tells it."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.is_file() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return f"{names[0] if names else platform.machine()} ({os.cpu_count()} cores)"


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--model", default="eval/tiny-qwen2-moe")
    parser.add_argument("--text", default="eval/text/calibration")
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--batches", type=int, default=4)
    parser.add_argument("--length", type=int, default=512)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--dtype", default="auto")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--engines", nargs="+", default=["resident", "streaming"])
    parser.add_argument("--json", type=Path)
    return parser.parse_args()


if __name__ == "__main__":
    main()
