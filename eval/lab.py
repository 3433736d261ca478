"""Compare pruning methods on one model: held-out loss after real cuts, over calibration seeds.

    python eval/lab.py --model eval/tiny-qwen2-moe --experts 45 40 30 --seeds 5 -o eval/lab.jsonl

Every (method, experts, seed) is one line of the output file; a run that is started again does what
is missing. The table at the end (also `--table FILE`) gives the mean and the spread (standard
deviation over seeds) of the held-out loss increase in nats.

A method is `criterion/allocator` as `moe-fair prune` takes them: `fair/tod`, `reap/uniform`.
"""

from __future__ import annotations

import argparse
import copy
import json
import statistics as stats
from collections import defaultdict
from pathlib import Path
from typing import Any

from moe_fair import pipeline
from moe_fair.collecting import collect, measure
from moe_fair.engines.resident import ResidentEngine
from moe_fair.evaluate import heldout_loss
from moe_fair.moe.calibration import CalibrationSet
from moe_fair.moe.load import Checkpoint
from moe_fair.moe.surgery import cut
from moe_fair.recipe import Recipe

METHODS = ["random/uniform", "frequency/uniform", "reap/uniform", "fair/uniform", "fair/tod"]
Row = dict[str, Any]


def main() -> None:
    """Measure what is missing, then print the table."""
    args = _arguments()
    rows = (
        [json.loads(line) for line in args.output.read_text().splitlines()]
        if args.output.exists()
        else []
    )
    done = {_key(r) for r in rows}
    recipe = Recipe(
        model=args.model,
        calibration=(args.calibration,),
        heldout=(args.heldout,),
        samples=args.samples,
        length=args.length,
        heldout_samples=args.heldout_samples,
    )
    source = pipeline.open_model(recipe)
    text = pipeline.heldout_set(recipe, source)
    assert text is not None
    original = measure(recipe, source, text, "original").mean
    print(f"{args.model}: held-out loss {original:.4f} on {text.tokens:,} tokens", flush=True)
    for seed in range(args.seeds):
        wanted = [(m, e) for m in args.methods for e in args.experts if (m, e, seed) not in done]
        if wanted:
            for row in _seed(recipe.with_settings({"seed": seed}), source, text, wanted):
                row["increase"] = row["loss"] - original
                rows.append(row)
                with args.output.open("a") as f:
                    f.write(json.dumps(row) + "\n")
    table = markdown(rows, args.methods, args.experts)
    print(table)
    if args.table:
        args.table.write_text(table + "\n")


def _seed(recipe: Recipe, source: Checkpoint, text: CalibrationSet, wanted: list) -> Any:
    """Calibrate once, then plan, cut and measure each wanted combination."""
    statistics = collect(recipe, source, pipeline.calibration_set(recipe, source, print), print)
    model = source.load(recipe.dtype, recipe.device).eval()
    for method, experts in wanted:
        name, _, allocate = method.partition("/")
        plan = pipeline.plan(
            statistics,
            recipe.with_settings(
                {"method": name, "allocate": allocate or None, "experts": experts}
            ),
        )
        pruned = copy.deepcopy(model)
        cut(pruned, plan.kept)
        batches = text.batches(recipe.batch_size)
        loss = heldout_loss(ResidentEngine(pruned), batches, text.domains).mean
        print(f"seed {recipe.seed} {method} {experts}: {loss:.4f}", flush=True)
        yield {"method": method, "experts": experts, "seed": recipe.seed, "loss": loss}


def markdown(rows: list[Row], methods: list[str], experts: list[int]) -> str:
    """Mean ± spread of the loss increase, a row per method, a column per budget."""
    cells: dict[tuple[str, int], list[float]] = defaultdict(list)
    for r in rows:
        cells[r["method"], r["experts"]].append(r["increase"])
    lines = [
        "| method | " + " | ".join(f"{e} experts" for e in experts) + " |",
        "|---" * (len(experts) + 1) + "|",
    ]
    for m in methods:
        shown = [
            f"{stats.mean(c):.4f} ± {stats.stdev(c) if len(c) > 1 else 0:.4f}"
            if (c := cells[m, e])
            else "-"
            for e in experts
        ]
        lines.append(f"| {m} | " + " | ".join(shown) + " |")
    return "\n".join(lines)


def _key(row: Row) -> tuple[str, int, int]:
    return row["method"], row["experts"], row["seed"]


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="eval/tiny-qwen2-moe")
    parser.add_argument("--calibration", default="eval/text/calibration")
    parser.add_argument("--heldout", default="eval/text/heldout")
    parser.add_argument("--samples", type=int, default=90)
    parser.add_argument("--length", type=int, default=256)
    parser.add_argument("--heldout-samples", type=int, default=400)
    parser.add_argument("--experts", type=int, nargs="+", default=[45, 40, 30])
    parser.add_argument("--methods", nargs="+", default=METHODS)
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("-o", "--output", type=Path, default=Path("eval/lab.jsonl"))
    parser.add_argument("--table", type=Path)
    return parser.parse_args()


if __name__ == "__main__":
    main()
