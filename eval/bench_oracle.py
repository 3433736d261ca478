"""What the oracle costs beside a loop over whole models with one expert masked.

    OMP_NUM_THREADS=1 python eval/bench_oracle.py --model eval/tiny-qwen2-moe --experts 20

Both measure the same removals on the same text, in one process, in turn; the ratio is of processor
time, the median of the repeats after one warm-up each. The loop masks the router's logits and
measures the loss as `moe-fair prune --heldout` does; the differences of their results are printed.
"""

from __future__ import annotations

import argparse
import statistics as stats
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from moe_fair.core.recipe import Recipe
from moe_fair.engines.batch import Batch
from moe_fair.engines.resident import ResidentEngine
from moe_fair.moe.blocks import MoeBlock, find_blocks
from moe_fair.moe.removal import RemovalLosses
from moe_fair.pipelines import moe as pipeline


@contextmanager
def without(block: MoeBlock, e: int) -> Iterator[None]:
    """The router's linear map gives -inf for expert e."""
    linear = F.linear

    def hide(x: Tensor, w: Tensor, b: Tensor | None = None) -> Tensor:
        y = linear(x, w, b)
        if w is block.router.weight:
            y = y.clone()
            y[..., e] = -torch.inf
        return y

    torch.nn.functional.linear = hide  # type: ignore[assignment]
    try:
        yield
    finally:
        torch.nn.functional.linear = linear  # type: ignore[assignment]


def naive(model: Any, batches: list[Batch], experts: int) -> dict[str, list[float]]:
    """Loss changes by whole forwards."""
    engine = ResidentEngine(model)

    def loss() -> float:
        parts = [(losses.double() * w).sum() for losses, w in engine.losses(batches)]
        return float(sum(parts)) / sum(int(b.mask[:, 1:].sum()) for b in batches)

    base = loss()
    found: dict[str, list[float]] = {}
    for block in find_blocks(model):
        found[block.name] = []
        for e in range(experts):
            with without(block, e):
                found[block.name].append(loss() - base)
    return found


def ours(model: Any, batches: list[Batch], experts: int) -> dict[str, list[float]]:
    """Loss changes by `RemovalLosses`."""
    sets = {b.name: [[e] for e in range(experts)] for b in find_blocks(model)}
    losses = RemovalLosses(model, batches)
    return {n: (c.sum(0) / losses.tokens).tolist() for n, c in losses.measure(sets)}


def timed(run: Callable[[], Any]) -> tuple[float, Any]:
    """Processor seconds, and the result."""
    started = time.process_time()
    result = run()
    return time.process_time() - started, result


def main() -> None:
    """Time both in turn."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="eval/tiny-qwen2-moe")
    parser.add_argument("--calibration", default="eval/text/calibration")
    parser.add_argument("--samples", type=int, default=8)
    parser.add_argument("--length", type=int, default=256)
    parser.add_argument("--experts", type=int, default=20, help="of every layer, the first ones")
    parser.add_argument("--batch-size", type=int, default=8, help="of both")
    parser.add_argument("--repeats", type=int, default=3)
    args = parser.parse_args()
    recipe = Recipe(
        model=args.model, calibration=(args.calibration,), samples=args.samples,
        length=args.length, device="cpu", dtype="float32",
    )  # fmt: skip
    source = pipeline.open_model(recipe)
    text = pipeline.calibration_set(recipe, source, print)
    batches = text.batches(args.batch_size)
    model = source.load("float32", "cpu").eval()
    ratios = []
    for repeat in range(args.repeats + 1):
        a, loop = timed(lambda: naive(model, batches, args.experts))
        b, quick = timed(lambda: ours(model, batches, args.experts))
        if repeat:
            ratios.append(b / a)
            print(f"loop {a:.1f} s, oracle {b:.1f} s of processor time: {b / a:.3f}", flush=True)
    worst = max(abs(x - y) for n in loop for x, y in zip(loop[n], quick[n], strict=True))
    print(
        f"median ratio {stats.median(ratios):.3f} ({min(ratios):.3f} to {max(ratios):.3f}), "
        f"largest difference of a loss change {worst:.1e}"
    )


if __name__ == "__main__":
    main()
