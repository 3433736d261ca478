"""What watching costs: collection against the bare model on the same tokens.

    python eval/bench_collect.py                       # the reference model, on this machine
    python eval/bench_collect.py --model DIR --device cuda --dtype bfloat16

Bare: frozen weights, forward + backward of the summed sequence losses with gradients down to the
embeddings' output, stock grouped_mm experts. Watched: the resident engine with every statistic.
The two alternate in one run after a warm-up; the figure is the median of the ratios. Targets: 1.25
for forward + backward on a CPU.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch

from moe_fair.engines.batch import Batch, sequence_losses, token_losses
from moe_fair.engines.resident import ResidentEngine
from moe_fair.engines.streaming import StreamingEngine
from moe_fair.moe.blocks import find_blocks
from moe_fair.moe.calibration_text import sample
from moe_fair.moe.checkpoint_source import Checkpoint
from moe_fair.moe.collector import ExpertCollector
from moe_fair.moe.engine_choice import start
from moe_fair.moe.statistics import collecting, unasked
from moe_fair.moe.text_sources import parse_source


def main() -> None:
    """Measure and print one table."""
    args = _arguments()
    source = Checkpoint(args.model)
    samples = args.batch_size * args.batches
    text = sample(
        [parse_source(args.text)], source.tokenizer(), samples=samples, length=args.length, seed=0
    )
    # one domain, so that every batch is full
    sequences = tuple((ids, 0) for ids, _ in text.sequences)
    batches = type(text)(("all",), sequences).batches(args.batch_size)
    engine, model = start(source, "resident", args.dtype, args.device, lambda *a: a[2])
    assert isinstance(engine, ResidentEngine)
    model.set_experts_implementation("grouped_mm")
    watched = lambda taylor: lambda: watch(engine, model, source, batches, taylor)  # noqa: E731
    rows = {
        "forward + backward, all statistics": (watched(True), lambda: bare(model, batches, True)),
        "forward only, no Taylor": (watched(False), lambda: bare(model, batches, False)),
    }
    if args.streaming:
        streaming, hollow = start(source, "streaming", args.dtype, args.device, lambda *a: a[2])
        assert isinstance(streaming, StreamingEngine)
        rows = {
            "streaming against resident, all statistics": (
                lambda: watch(streaming, hollow, source, batches, True),
                watched(True),
            )
        }
    name = torch.cuda.get_device_name() if model.device.type == "cuda" else platform.processor()
    print(f"{args.model}: {text.tokens} tokens, batches of {args.batch_size} × {args.length}")
    print(f"{name or 'cpu'}, {torch.get_num_threads()} threads, torch {torch.__version__}\n")
    print("| what | ratio (median) | spread | seconds | of |\n|---|---|---|---|---|")
    found = {}
    for what, (ours, theirs) in rows.items():
        pairs = [(timed(ours, model), timed(theirs, model)) for _ in range(args.repeats + 1)][1:]
        ratios = [a / b for a, b in pairs]
        a, b = (statistics.median(x) for x in zip(*pairs, strict=True))
        found[what] = statistics.median(ratios)
        spread = f"{min(ratios):.2f}-{max(ratios):.2f}"
        print(f"| {what} | {found[what]:.3f} | {spread} | {a:.2f} | {b:.2f} |", flush=True)
    if args.json:
        args.json.write_text(json.dumps(found, indent=1) + "\n")


def watch(
    engine: ResidentEngine | StreamingEngine,
    model: torch.nn.Module,
    source: Checkpoint,
    batches: list[Batch],
    taylor: bool,
) -> None:
    """A whole collection."""
    wanted = collecting(unasked("always", "usual"), ["counterfactual"], backward=taylor)
    collector = ExpertCollector(find_blocks(model), source.groups, ("all",), wanted)
    with collector:
        engine.run(batches, collector, backward=taylor)


def bare(model: torch.nn.Module, batches: list[Batch], backward: bool) -> None:
    """The same tokens with nobody watching."""
    for batch in batches:
        batch = batch.to(model.device)
        with torch.set_grad_enabled(backward):
            entry = model.get_input_embeddings()(batch.input_ids).requires_grad_(backward)
            logits = model(inputs_embeds=entry, use_cache=False).logits
            if backward:
                losses, weights = token_losses(logits, batch)
                sequence_losses(losses, weights, batch.predicted()).sum().backward()


def timed(work: Callable[[], None], model: torch.nn.Module) -> float:
    """Wall seconds, the device's queue emptied on both sides."""
    wait = torch.cuda.synchronize if model.device.type == "cuda" else (lambda: None)
    wait()
    started = time.perf_counter()
    work()
    wait()
    return time.perf_counter() - started


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--model", default="eval/tiny-qwen2-moe")
    parser.add_argument("--text", default="eval/text/calibration")
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--batches", type=int, default=4)
    parser.add_argument("--length", type=int, default=256)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--dtype", default="auto")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--streaming", action="store_true", help="streaming against resident")
    parser.add_argument("--json", type=Path)
    return parser.parse_args()


if __name__ == "__main__":
    main()
