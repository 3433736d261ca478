"""Compare pruning methods: held-out loss after real cuts, over models, budgets and seeds.

    python eval/lab.py --models eval/tiny-qwen2-moe lab/mixtral --ratios .25 .5 --seeds 5 \
        --methods reap/uniform frequency/uniform+refit -o eval/lab.jsonl --jobs 3

A method is `criterion/allocator` as `moe-fair prune` takes them, with `+repair` behind it where the
remaining experts shall be repaired: `fair/tod`, `reap/uniform+distill`; `default` is what the
command does when it is told nothing. Every (model, method, ratio, seed) is one line of the output
file; a run that is started again does what is missing, each (model, seed) in a process of its own.

A model that was made by `eval/train_tiny_moe.py` brings its own text; others take --calibration and
--heldout. The increase of the held-out loss is in nats; the tables at the end (also `--table FILE`)
give its mean and spread (standard deviation over seeds), and the geometric mean over models and
budgets relative to `--reference`.
"""

from __future__ import annotations

import argparse
import copy
import json
import math
import multiprocessing
import os
import statistics as stats
import time
from collections import defaultdict
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

METHODS = ["random/uniform", "frequency/uniform", "reap/uniform", "fair/uniform", "fair/tod"]
Row = dict[str, Any]
Key = tuple[str, str, float, int]


def main() -> None:
    """Measure what is missing, then print the tables."""
    args = _arguments()
    rows = read(args.output)
    done = {_key(r) for r in rows}
    jobs = []
    for seed in range(args.seeds):
        for model in args.models:
            wanted = [
                (m, r)
                for r in args.ratios
                for m in args.methods
                if (Path(model).name, m, r, seed) not in done
            ]
            if wanted:
                jobs.append((args, model, seed, wanted))
    # weights and thread pools do not survive a fork
    context = multiprocessing.get_context("spawn")
    os.environ["OMP_NUM_THREADS"] = str(max(1, (os.cpu_count() or 1) // args.jobs))
    with context.Pool(min(args.jobs, len(jobs)) or 1, maxtasksperchild=1) as pool:
        pool.map(_job, jobs, chunksize=1)
    rows = read(args.output)
    text = tables(rows, args.methods, args.ratios, args.reference)
    print(text)
    if args.table:
        args.table.write_text(text + "\n")


def read(path: Path) -> list[Row]:
    """The rows that are there."""
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def _job(job: tuple[argparse.Namespace, str, int, list[tuple[str, float]]]) -> None:
    args, model, seed, wanted = job
    for row in measure_seed(args, model, seed, wanted):
        with args.output.open("a") as f:  # one short write a line: processes do not mix them
            f.write(json.dumps(row) + "\n")


def measure_seed(
    args: argparse.Namespace, model: str, seed: int, wanted: Sequence[tuple[str, float]]
) -> Iterator[Row]:
    """Calibrate once, then plan, cut, repair and measure each wanted (method, ratio)."""
    from moe_fair import pipeline
    from moe_fair.collecting import collect
    from moe_fair.engines.loaded import LoadedLayers
    from moe_fair.engines.resident import ResidentEngine
    from moe_fair.engines.streaming import StreamingEngine
    from moe_fair.evaluate import heldout_loss
    from moe_fair.moe.repair import Repairer
    from moe_fair.moe.surgery import cut
    from moe_fair.recipe import Recipe
    from moe_fair.repairing import repair_kind

    own = Path(model) / "text"
    recipe = Recipe(
        model=model,
        calibration=(str(own / "calibration") if own.exists() else args.calibration,),
        heldout=(str(own / "heldout") if own.exists() else args.heldout,),
        samples=args.samples,
        length=args.length,
        heldout_samples=args.heldout_samples,
        seed=seed,
        device="cpu",
    )
    source = pipeline.open_model(recipe)
    text = pipeline.calibration_set(recipe, source, lambda _: None)
    heldout = pipeline.heldout_set(recipe, source)
    assert heldout is not None
    batches = heldout.batches(recipe.batch_size)
    loaded = source.load(recipe.dtype, recipe.device).eval()

    def loss(m: Any) -> float:
        return heldout_loss(ResidentEngine(m), batches, heldout.domains).mean

    base = loss(loaded)
    statistics = collect(recipe, source, text, lambda _: None)
    for method, ratio in wanted:
        started = time.perf_counter()
        chosen = recipe.with_settings({"ratio": ratio, **settings(method)})
        try:
            plan = pipeline.plan(statistics, chosen)
        except ValueError as e:  # a ratio that groups of experts with equal counts cannot meet
            print(f"{Path(model).name} {ratio:g} {method}: left out: {e}", flush=True)
            continue
        pruned = copy.deepcopy(loaded)
        kind = repair_kind(chosen, source)
        if kind is None:
            cut(pruned, plan.kept)
        else:
            engine = StreamingEngine(LoadedLayers(pruned))
            Repairer(engine, plan.kept, kind).run(text.batches(recipe.batch_size))
        after = loss(pruned)
        name = Path(model).name
        print(f"{name} seed {seed} {ratio:g} {method}: {after - base:+.4f}", flush=True)
        yield {
            "model": name, "method": method, "ratio": ratio, "seed": seed, "loss": after,
            "increase": after - base, "base": base, "tokens": text.tokens,
            "heldout_tokens": heldout.tokens, "kept": [len(v) for v in plan.kept.values()],
            "seconds": round(time.perf_counter() - started, 1),
        }  # fmt: skip


def settings(method: str) -> Row:
    """`criterion/allocator+repair` as settings of a recipe."""
    if method == "default":
        return {}
    rest, _, kind = method.partition("+")
    name, _, allocate = rest.partition("/")
    return {"method": name, "allocate": allocate or None, "repair": kind or "none"}


def tables(rows: list[Row], methods: Sequence[str], ratios: Sequence[float], reference: str) -> str:
    """A table a model, then the geometric mean of the increase relative to the reference."""
    cells: dict[tuple[str, str, float], list[float]] = defaultdict(list)
    for r in rows:
        cells[r["model"], r["method"], r["ratio"]].append(r["increase"])
    models = list(dict.fromkeys(r["model"] for r in rows))
    head = [f"{100 * r:g} % removed" for r in ratios]
    lines = []
    for model in models:
        lines += [f"### {model}", "", _row("method", head), "|---" * (len(head) + 1) + "|"]
        for m in methods:
            found = [cells.get((model, m, r)) for r in ratios]
            if any(found):
                lines.append(_row(m, [_spread(c) for c in found]))
        lines.append("")
    lines += [f"### Increase relative to {reference}, geometric mean", ""]
    lines += [_row("method", [*models, "all", "worst"]), "|---" * (len(models) + 3) + "|"]
    for m in methods:
        shown, every = [], []
        for model in models:
            pairs = [
                (stats.mean(cells[model, m, r]), stats.mean(cells[model, reference, r]))
                for r in ratios
                if (model, m, r) in cells and (model, reference, r) in cells
            ]
            shares = [max(a, 1e-6) / max(b, 1e-6) for a, b in pairs]
            every += shares
            shown.append(_geometric(shares))
        if every:
            lines.append(_row(m, [*shown, _geometric(every), f"{max(every):.3f}"]))
    return "\n".join(lines)


def _row(name: str, values: Sequence[str]) -> str:
    return f"| {name} | " + " | ".join(values) + " |"


def _spread(values: list[float] | None) -> str:
    if not values:
        return "-"
    spread = f" ± {stats.stdev(values):.4f}" if len(values) > 1 else ""
    return f"{stats.mean(values):.4f}{spread}"


def _geometric(shares: list[float]) -> str:
    return f"{math.exp(stats.mean(map(math.log, shares))):.3f}" if shares else "-"


def _key(row: Row) -> Key:
    return row["model"], row["method"], row["ratio"], row["seed"]


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--models", nargs="+", default=["eval/tiny-qwen2-moe"])
    parser.add_argument("--calibration", default="eval/text/calibration")
    parser.add_argument("--heldout", default="eval/text/heldout")
    parser.add_argument("--samples", type=int, default=256)
    parser.add_argument("--length", type=int, default=256)
    parser.add_argument("--heldout-samples", type=int, default=400)
    parser.add_argument("--ratios", type=float, nargs="+", default=[0.25, 1 / 3, 0.5, 0.75])
    parser.add_argument("--methods", nargs="+", default=METHODS)
    parser.add_argument("--reference", default="reap/uniform")
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--jobs", type=int, default=1, help="processes side by side")
    parser.add_argument("-o", "--output", type=Path, default=Path("eval/lab.jsonl"))
    parser.add_argument("--table", type=Path)
    return parser.parse_args()


if __name__ == "__main__":
    main()
