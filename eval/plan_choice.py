"""Which plans should a trial be given, and how many judges? Simulated on held-out windows.

    python eval/plan_choice.py --models eval/tiny-qwen2-moe lab/qwen3_moe --ratios .5 .25 \
        --samples 96 --heldout-samples 240 -o lab/choice.jsonl

Every plan that some set below holds is made of the calibration text, with own text beside it (as
`default@+.25` of `eval/compare.py`), repaired as roughly as trials do, on all of that text, and
measured on every held-out window. Then, again and again, so many windows drawn at random judge,
the plan of a set that loses least on them is taken, and the other windows say what it is worth. A
cell is the mean of that over what the best of `PEERS` comes to on all windows; the last column is
the geometric mean. What was measured is in the output file; a run that is started again does the
rest.
"""

from __future__ import annotations

import json
import math
import os
import random
import statistics as stats
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import compare

TEXT = "+.25"
OWN = "second-order"
PEERS = ("fair", "mone/uniform", "reap/uniform")
SETS: dict[str, tuple[str, ...]] = {
    "the ten of before": (
        OWN, "fair", "taylor-sq/global", "reap/uniform", "reap/tod", "mone/uniform",
        "mone/global", "frequency/uniform", "reap/global", "reconstruction/global",
    ),
    "five": (OWN, "consensus/global", "reconstruction/global", "reconstruction/tod", "fair"),
    "five, taylor-sq for consensus": (
        OWN, "taylor-sq/global", "reconstruction/global", "reconstruction/tod", "fair",
    ),
    **{f"{n} alone": (n,) for n in ("consensus/global", "reconstruction/global",
                                    "reconstruction/tod", "fair", OWN)},
}  # fmt: skip
JUDGES = (15, 30, 60)
DRAWS = 400
Row = dict[str, Any]


def measure(args: Any, model: str, seed: int, ratio: float) -> Row:
    """What each plan changes of every held-out window's summed loss, and the windows' tokens."""
    from moe_fair.pipelines import moe as pipeline
    from moe_fair.pipelines.calibrate import collect
    from moe_fair.pipelines.rivals import with_method
    from moe_fair.pipelines.trial_losses import losses_of

    subject = compare.Subject(args, model, seed, TEXT)
    chosen = subject.recipe.with_settings({"ratio": ratio, "rivals": ("none",)})
    statistics = collect(subject.recipe, subject.source, subject.text)
    assert statistics is not None  # there is no other process
    names = dict.fromkeys(n for s in (*SETS.values(), PEERS) for n in s)
    plans = [
        pipeline.plan(statistics, chosen if n == OWN else with_method(chosen, n, "plan", ""))
        for n in names
    ]
    with tempfile.TemporaryDirectory() as work:
        losses, counts = losses_of(
            subject.recipe, subject.source, subject.heldout, plans, Path(work) / "losses.json",
            print, subject.text,
        )  # fmt: skip
    changes = (losses[1:] - losses[0]).tolist()
    return {
        "model": subject.name, "ratio": ratio, "seed": seed, "tokens": counts.tolist(),
        "changes": dict(zip(names, changes, strict=True)),
    }  # fmt: skip


def mean(changes: Sequence[float], tokens: Sequence[float], windows: Sequence[int]) -> float:
    """Change a token over some windows."""
    return sum(changes[i] for i in windows) / sum(tokens[i] for i in windows)


def worth(row: Row, plans: Sequence[str], judges: int, draws: int = DRAWS) -> float:
    """Mean change, by the windows that did not judge, of the plans that so many judges take."""
    order, tokens = random.Random(0), row["tokens"]
    found = []
    for _ in range(draws):
        windows = order.sample(range(len(tokens)), len(tokens))
        judging, rest = windows[:judges], windows[judges:]
        taken = min(plans, key=lambda p: mean(row["changes"][p], tokens, judging))
        found.append(mean(row["changes"][taken], tokens, rest))
    return stats.mean(found)


def table(rows: Sequence[Row]) -> Iterator[str]:
    """Markdown: a line for each set and number of judges, a column for each cell."""
    every = [range(len(r["tokens"])) for r in rows]
    best = [
        min(mean(r["changes"][p], r["tokens"], windows) for p in PEERS)
        for r, windows in zip(rows, every, strict=True)
    ]
    cells = [f"{r['model']} {100 * r['ratio']:.3g} %, {r['seed']}" for r in rows]
    yield f"| tried | judges | {' | '.join(cells)} | geometric mean |"
    yield "|---" * (3 + len(cells)) + "|"
    for name, plans in SETS.items():
        for judges in JUDGES if len(plans) > 1 else JUDGES[:1]:
            shares = [worth(r, plans, judges) / b for r, b in zip(rows, best, strict=True)]
            yield (
                f"| {name} | {judges if len(plans) > 1 else '-'} | "
                f"{' | '.join(f'{s:.2f}' for s in shares)} | {_geometric(shares):.3f} |"
            )


def _geometric(shares: Sequence[float]) -> float:
    return math.exp(stats.mean(map(math.log, shares))) if min(shares) > 0 else math.nan


def main() -> None:
    """Measure what is missing, then print the table."""
    made = compare.parser()
    made.description = __doc__
    args = made.parse_args()
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    args.output.parent.mkdir(parents=True, exist_ok=True)
    done: Mapping[tuple[str, float, int], Row] = {
        (r["model"], r["ratio"], r["seed"]): r for r in compare.read(args.output)
    }
    for seed in range(args.seeds) if not args.show else ():
        for model in args.models:
            for ratio in args.ratios:
                if (Path(model).name, ratio, seed) not in done:
                    row = measure(args, model, seed, ratio)
                    with args.output.open("a") as f:
                        f.write(json.dumps(row) + "\n")
    print("\n".join(table(compare.read(args.output))))


if __name__ == "__main__":
    main()
