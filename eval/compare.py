"""Compare pruning methods by held-out loss and agreement after real cuts.

    python eval/compare.py --models eval/tiny-qwen2-moe lab/mixtral --ratios .25 .5 --seeds 5 \
        --methods default recipes/rivals/*.yaml reap/uniform+distill -o compare.jsonl --jobs 3 \
        --table compare.md --csv compare.csv --plot compare.png

A method is one of

- `criterion/allocator` as `moe-fair prune` takes them, with `+repair` behind it where the remaining
  experts shall be repaired: `fair/tod`, `reap/uniform+distill`; `+merge` and `+ream` merge
  experts, and are repaired with `+merge+refit`;
- `criterion/evoesap`: its order, with the budget that `eval/evoesap.py` finds on the calibration
  text in `--evaluations`;
- a recipe's file, called by its name: `recipes/rivals/reap.yaml` is `reap`;
- `default`: what the command does when it is told nothing, but for the text.

With `@self` behind it a method is calibrated on text that the model samples itself, with `@half` on
as much of that as of what is given, with `@+1` on all that is given and as many windows of own text
beside it, `@+.25` a quarter as many (`default@+.25`); own text is kept beside the output file.
`--unseen DIRECTORY` judges every result on domains that calibration text does not hold, too
(`eval/unseen_text.py` makes them).

Every (model, method, ratio, seed) is one line of the output file; a run that is started again does
what is missing, each (model, seed) in a process of its own. A model that was made by
`eval/train_tiny_moe.py` brings its own text; others take --calibration and --heldout.

The increase of the held-out loss is in nats; KL and acceptance are those of `moe_fair.evaluate.
agreement` on `--agreement-samples` held-out windows. The table gives mean and spread (standard
deviation over seeds), and the geometric mean over models and budgets relative to `--reference`,
over the cells where both were measured.
"""

from __future__ import annotations

import argparse
import copy
import csv
import json
import math
import multiprocessing
import os
import statistics as stats
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import nn

    from moe_fair.core.plan import Plan
    from moe_fair.core.recipe import Recipe
    from moe_fair.core.units import Statistics
    from moe_fair.evaluate import HeldoutLoss
    from moe_fair.moe.calibration_text import CalibrationSet
    from moe_fair.moe.checkpoint_source import Checkpoint

METHODS = ["random/uniform", "frequency/uniform", "reap/uniform", "fair/uniform", "fair/tod"]
SEARCH = "evoesap"
TEXTS = ("given", "self", "half", "+SHARE")
Row = dict[str, Any]
Key = tuple[str, str, float, int]
Cells = dict[tuple[str, str, float], list[Row]]


def main(arguments: Sequence[str] | None = None) -> list[Row]:
    """Measure what is missing, then print the tables; returns all rows that were asked for."""
    args = parser().parse_args(arguments)
    rows = measure(args)
    text = tables(rows, args.methods, args.ratios, args.reference)
    print(text)
    if args.table:
        args.table.write_text(text + "\n")
    if args.csv:
        write_csv(rows, args.csv)
    if args.plot:
        plot(rows, args.methods, args.plot)
    return rows


def measure(args: argparse.Namespace) -> list[Row]:
    """Every row asked for, those of earlier runs included."""
    names = [called(m) for m in args.methods]
    if twice := {n for n in names if names.count(n) > 1}:
        sys.exit(f"compare: error: two methods are called {sorted(twice)[0]!r}; rename a recipe")
    args.output.parent.mkdir(parents=True, exist_ok=True)
    done = {_key(r) for r in read(args.output)}
    jobs = []
    for seed in range(args.seeds):
        for model in args.models:
            wanted = [
                (m, r)
                for r in args.ratios
                for m in args.methods
                if (Path(model).name, called(m), r, seed) not in done
            ]
            for text in dict.fromkeys(text_of(m) for m, _ in wanted):
                jobs.append((args, model, seed, [w for w in wanted if text_of(w[0]) == text]))
    # weights and thread pools do not survive a fork
    context = multiprocessing.get_context("spawn")
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, len(os.sched_getaffinity(0)) // args.jobs)))
    if jobs and not args.show:
        with context.Pool(min(args.jobs, len(jobs)), maxtasksperchild=1) as pool:
            pool.map(_job, jobs, chunksize=1)
    models = {Path(m).name for m in args.models}
    return [
        r
        for r in read(args.output)
        if r["model"] in models
        and r["method"] in names
        and r["ratio"] in args.ratios
        and r["seed"] < args.seeds
    ]


def called(method: str) -> str:
    """A method's name in the tables."""
    rule, at, text = method.partition("@")
    return (Path(rule).stem if rule.endswith(".yaml") else rule) + at + text


def text_of(method: str) -> str:
    """What a method is calibrated on: `given`, `self`, `half`, or so much own text more, `+1`."""
    text = method.partition("@")[2] or "given"
    if text not in TEXTS and not (text.startswith("+") and added(text) > 0):
        sys.exit(f"compare: error: {method}: text is one of {', '.join(TEXTS)}")
    return text


def added(text: str) -> float:
    """Windows of own text on top of those that are given, as a share of these."""
    try:
        return float(text) if text.startswith("+") else 0.0
    except ValueError:
        return 0.0


def read(path: Path) -> list[Row]:
    """The rows that are there."""
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def _job(job: tuple[argparse.Namespace, str, int, list[tuple[str, float]]]) -> None:
    args, model, seed, wanted = job
    for row in Subject(args, model, seed, text_of(wanted[0][0])).rows(wanted):
        with args.output.open("a") as f:  # one short write a line: processes do not mix them
            f.write(json.dumps(row) + "\n")


class Subject:
    """One model with one text of one seed: calibrated once, for every method."""

    def __init__(self, args: argparse.Namespace, model: str, seed: int, text: str) -> None:
        from moe_fair.core.recipe import Recipe
        from moe_fair.engines.processes import ALONE
        from moe_fair.pipelines import moe as pipeline
        from moe_fair.pipelines.own_source import calibration_text

        own = Path(model) / "text"
        given = str(own / "calibration") if own.exists() else args.calibration
        more = added(text)
        sources = {"given": (given,), "self": ("self",), "half": (given, "self")}
        self.args, self.name, self.seed = args, Path(model).name, seed
        self.recipe = Recipe(
            model=model,
            calibration=sources.get(text, (given,)),
            self_share=more or None,
            heldout=(str(own / "heldout") if own.exists() else args.heldout,),
            samples=args.samples,
            length=args.length,
            heldout_samples=args.heldout_samples,
            batch_size=args.batch_size,
            seed=seed,
            device=args.device,
        )
        self.source: Checkpoint = pipeline.open_model(self.recipe)
        folder = args.output.parent / "own" / f"{self.name}-{seed}-{text}"
        if text != "given":
            folder.mkdir(parents=True, exist_ok=True)
        started = time.process_time()
        self.text: CalibrationSet = calibration_text(
            self.recipe, self.source, folder, _quiet, ALONE
        )[0]
        self.spent = {"text": time.process_time() - started}  # seconds of processor time
        self.heldout = _windows(self.recipe, self.source)
        self.unseen: CalibrationSet | None = None
        if args.unseen is not None:
            elsewhere = replace(self.recipe, heldout=(str(args.unseen),))
            self.unseen = _windows(elsewhere, self.source)
        self._partial: Statistics | None = None  # of the text without what plans are tried on
        self.model: nn.Module = self.source.load(self.recipe.dtype, self.recipe.device).eval()

    def rows(self, wanted: Sequence[tuple[str, float]]) -> Iterator[Row]:
        """Plan, cut, repair and measure each wanted (method, ratio)."""
        from moe_fair.evaluate.agreement import agreement

        base, apart = self.loss(self.model, self.heldout), self.loss(self.model, self.unseen)
        few = _windows(
            replace(self.recipe, heldout_samples=self.args.agreement_samples), self.source
        )
        batches = few.batches(self.recipe.batch_size)
        statistics = self.collect([m for m, _ in wanted if not self._tries(m)])
        for method, ratio in wanted:
            started, spent = time.perf_counter(), time.process_time()
            collected = self.spent.get("trial", 0.0)
            chosen = self.recipe.with_settings({"ratio": ratio, **settings(method)})
            try:
                if self._tries(method):
                    plan = self._tried(chosen)
                else:
                    plan, statistics = self._plan(statistics, chosen, method)
            except ValueError as e:  # a ratio that groups of experts with equal counts cannot meet
                print(f"{self.name} {ratio:g} {called(method)}: left out: {e}", flush=True)
                continue
            planned = time.perf_counter() - started
            trials = plan.explanation.get("trials", {})
            pruned = self.cut(plan, chosen)
            seconds = time.perf_counter() - started
            busy = time.process_time() - spent - (self.spent.get("trial", 0.0) - collected)
            after, elsewhere = self.loss(pruned, self.heldout), self.loss(pruned, self.unseen)
            increase = after.mean - base.mean
            near = agreement(_engine(self.model), _engine(pruned), batches, few.domains).mean
            print(f"{self.name} seed {self.seed} {ratio:g} {called(method)}: {increase:+.4f}",
                  flush=True)  # fmt: skip
            yield {
                "model": self.name, "method": called(method), "ratio": ratio, "seed": self.seed,
                "loss": after.mean, "increase": increase, "base": base.mean, "kl": near.kl,
                "domains": {d: v - base.domains[d] for d, v in after.domains.items()},
                "unseen": {d: v - apart.domains[d] for d, v in elsewhere.domains.items()},
                "acceptance": near.acceptance, "top1": near.top1,
                "predicted": plan.explanation.get("predicted_change"), "tokens": self.text.tokens,
                "heldout_tokens": self.heldout.tokens, "agreement_tokens": near.tokens,
                "kept": [len(v) for v in plan.kept.values()],
                "taken": trials.get("taken"), "trials": trials,
                "planning_seconds": round(planned, 1), "seconds": round(seconds, 1),
                "processor": {"result": round(busy, 1),
                              **{k: round(v, 1) for k, v in self.spent.items()}},
            }  # fmt: skip

    def loss(self, model: nn.Module, text: CalibrationSet | None) -> HeldoutLoss:
        """Loss in nats of all of a text and of each domain; of no domain where there is no text."""
        from moe_fair.evaluate import HeldoutLoss, heldout_loss

        if text is None:
            return HeldoutLoss(0.0, {}, 0)
        return heldout_loss(_engine(model), text.batches(self.recipe.batch_size), text.domains)

    def _tries(self, method: str) -> bool:
        """The method tries its plan against others'."""
        from moe_fair.pipelines.trial_text import held_back

        return bool(held_back(self.recipe.with_settings(settings(method)), self.text))

    def _tried(self, chosen: Recipe) -> Plan:
        """The plan that `moe-fair prune` takes when it tries several; statistics are kept."""
        from moe_fair.pipelines import moe as pipeline
        from moe_fair.pipelines.calibrate import collect
        from moe_fair.pipelines.plan_selection import best_plan
        from moe_fair.pipelines.repair import repair_kind
        from moe_fair.pipelines.trial_text import split_holdout, teaching_text

        text, trial = split_holdout(chosen, self.text)
        assert trial is not None
        if self._partial is None:
            started = time.process_time()
            self._partial = collect(self.recipe, self.source, text, _quiet)
            self.spent["trial"] = time.process_time() - started
            assert self._partial is not None
        with tempfile.TemporaryDirectory() as work:
            home = Path(work) / "trials.json"
            plan = pipeline.plan
            teaching = teaching_text(self.text, trial, repair_kind(chosen, self.source))
            return best_plan(
                plan, chosen, self.source, self._partial, trial, home, _quiet, teaching=teaching
            )

    def collect(self, methods: Sequence[str]) -> Statistics | None:
        """Statistics for all the methods, if there are any."""
        from moe_fair.moe.statistics import collecting, unasked
        from moe_fair.pipelines.calibrate import collect
        from moe_fair.pipelines.collection import needed

        if not methods:
            return None
        asked = unasked("always", "usual")
        for m in methods:
            asked |= needed(self.recipe.with_settings(settings(m)))
        wanted = collecting(asked)
        found = collect(self.recipe, self.source, self.text, _quiet, collected=wanted)
        assert found is not None  # there is no other process
        return found

    def _plan(
        self, statistics: Statistics | None, chosen: Recipe, method: str
    ) -> tuple[Plan, Statistics]:
        """The plan, and the statistics with whatever had to be measured for it."""
        from moe_fair.core.allocate import allocator, needs
        from moe_fair.core.cost_curves import holds_curves
        from moe_fair.pipelines import checks
        from moe_fair.pipelines import moe as pipeline
        from moe_fair.pipelines.collection import for_prune
        from moe_fair.pipelines.removal_costs import holds_alone, measure_alone, measure_curves

        assert statistics is not None  # collected for this method
        if _searches(method):
            from evoesap import search

            return search(chosen, statistics, evaluations=self.args.evaluations), statistics
        removal, _, rule = checks.method(chosen)
        if "alone" in for_prune(chosen) and not holds_alone(statistics):
            statistics = measure_alone(chosen, self.source, self.text, statistics, None, _quiet)
        if needs(allocator(rule), "costs") and not holds_curves(statistics, removal.name, None):
            with tempfile.TemporaryDirectory() as work:
                statistics = measure_curves(
                    chosen, self.source, self.text, statistics, removal.name, Path(work), _quiet
                )
        return pipeline.plan(statistics, chosen), statistics

    def cut(self, plan: Plan, chosen: Recipe) -> nn.Module:
        """A copy of the model, pruned or merged, and repaired."""

        from moe_fair.engines.loaded import LoadedLayers
        from moe_fair.engines.streaming import StreamingEngine
        from moe_fair.moe.blocks import find_blocks
        from moe_fair.moe.merge import write_merged
        from moe_fair.moe.repair import Repairer
        from moe_fair.moe.repaired_layer import put_merged
        from moe_fair.moe.surgery import cut
        from moe_fair.pipelines.repair import repair_kind, repair_text

        pruned = copy.deepcopy(self.model)
        kind = repair_kind(chosen, self.source, merges=plan.merges)
        with tempfile.TemporaryDirectory() as work:
            merged = Path(work) / "merged"
            if plan.merges:
                write_merged(self.source, plan, merged)
            if kind is not None:
                engine = StreamingEngine(LoadedLayers(pruned))
                text = repair_text(chosen, self.source, self.text, kind, engine)
                Repairer(engine, plan.kept, kind, merged=merged).run(text)
                return pruned
            cut(pruned, plan.kept)
            for block in find_blocks(pruned):
                put_merged(block, merged, None)
        return pruned


def _windows(recipe: Recipe, source: Checkpoint) -> CalibrationSet:
    from moe_fair.pipelines import moe as pipeline

    found = pipeline.heldout_set(recipe, source)
    assert found is not None  # the recipe names held-out text
    return found


def _engine(model: nn.Module) -> Any:
    from moe_fair.engines.resident import ResidentEngine

    return ResidentEngine(model)


def _quiet(_: str) -> None:
    """Nothing is said."""


def settings(method: str) -> Row:
    """A method as settings of a recipe, but for its text."""
    method = method.partition("@")[0]
    if method == "default":
        return {}
    if method.endswith(".yaml"):
        from moe_fair.core.recipe_file import read_settings

        return dict(read_settings(Path(method)))
    rest, _, kind = method.partition("+")
    name, _, allocate = rest.partition("/")
    how, _, repair = kind.partition("+")
    if how in ("merge", "ream"):
        chosen = {"method": name, "allocate": allocate or None, "reduce": how}
        return {**chosen, "repair": repair or "none"}
    rule = None if _searches(method) else allocate or None
    return {"method": name, "allocate": rule, "repair": kind or "none"}


def _searches(method: str) -> bool:
    return method.partition("+")[0].endswith(f"/{SEARCH}")


def tables(rows: list[Row], methods: Sequence[str], ratios: Sequence[float], reference: str) -> str:
    """A table a model and measure, then the geometric mean of the increase relative to one."""
    names = [called(m) for m in methods]
    cells = cells_of(rows)
    models = list(dict.fromkeys(r["model"] for r in rows))
    head = [f"{100 * r:.3g} % removed" for r in ratios]
    lines = []
    for model in models:
        for what, measure in (("increase of the held-out loss", "increase"),
                              ("acceptance", "acceptance")):  # fmt: skip
            found = {
                m: [_values(cells.get((model, m, r), []), measure) for r in ratios] for m in names
            }
            if any(any(v) for v in found.values()):
                lines += [f"### {model}: {what}", "", _row("method", head)]
                lines += ["|---" * (len(head) + 1) + "|"]
                lines += [_row(m, [_spread(c) for c in v]) for m, v in found.items() if any(v)]
                lines.append("")
    lines += [f"### Increase relative to {reference}, geometric mean", ""]
    lines += [_row("method", [*models, "all", "worst"]), "|---" * (len(models) + 3) + "|"]
    for m in names:
        shown, every = [], []
        for model in models:
            shares = [s for r in ratios if (s := relative(cells, model, m, reference, r))]
            every += shares
            shown.append(_geometric(shares))
        if every:
            lines.append(_row(m, [*shown, _geometric(every), f"{max(every):.3f}"]))
    return "\n".join(lines)


def relative(cells: Cells, model: str, method: str, reference: str, ratio: float) -> float | None:
    """A method's mean increase over another's, over the seeds that both were measured with."""
    mine = {r["seed"]: r["increase"] for r in cells.get((model, method, ratio), [])}
    theirs = {r["seed"]: r["increase"] for r in cells.get((model, reference, ratio), [])}
    both = sorted(set(mine) & set(theirs))
    if not both:
        return None
    a, b = (stats.mean(v[s] for s in both) for v in (mine, theirs))
    return max(a, 1e-6) / max(b, 1e-6)


def write_csv(rows: list[Row], path: Path) -> None:
    """One line per model, method and ratio: means and standard deviations over seeds."""
    measures = ("increase", "kl", "acceptance", "top1", "seconds")
    with path.open("w", newline="") as f:
        writer = csv.writer(f)
        writer.writerow(
            [
                "model",
                "method",
                "ratio",
                "seeds",
                *(f"{m}_{s}" for m in measures for s in ("mean", "sd")),
            ]
        )
        for (model, method, ratio), found in cells_of(rows).items():
            line: list[Any] = [model, method, ratio, len(found)]
            for m in measures:
                values = _values(found, m)
                line.append(stats.mean(values) if values else "")
                line.append(stats.stdev(values) if len(values) > 1 else "")
            writer.writerow(line)


def plot(rows: list[Row], methods: Sequence[str], path: Path) -> None:
    """A panel a model: increase over share removed, one line a method, spread over seeds."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    cells = cells_of(rows)
    models = list(dict.fromkeys(r["model"] for r in rows))
    figure, axes = pyplot.subplots(
        1, len(models), figsize=(4.6 * len(models) + 2.4, 4.4), squeeze=False, layout="constrained"
    )
    colours = pyplot.get_cmap("tab20").colors
    for axis, model in zip(axes[0], models, strict=True):
        for i, name in enumerate(map(called, methods)):
            points = sorted((r, _values(c, "increase")) for (mo, me, r), c in cells.items()
                            if (mo, me) == (model, name))  # fmt: skip
            if points:
                x = [100 * r for r, _ in points]
                y = [stats.mean(v) for _, v in points]
                spread = [stats.stdev(v) if len(v) > 1 else 0.0 for _, v in points]
                look = {"marker": "o", "markersize": 3.5, "capsize": 2, "color": colours[i % 20]}
                width = 2.4 if name == "default" else 1.1
                axis.errorbar(x, y, spread, label=name, linewidth=width, **look)
        axis.set(title=model, xlabel="experts removed, %", yscale="log")
        axis.grid(which="both", alpha=0.25)
    axes[0][0].set_ylabel("increase of the held-out loss, nats")
    handles, labels = axes[0][0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside right center", fontsize=8)
    figure.savefig(path, dpi=110)
    pyplot.close(figure)


def cells_of(rows: list[Row]) -> Cells:
    cells: Cells = defaultdict(list)
    for r in rows:
        cells[r["model"], r["method"], r["ratio"]].append(r)
    return cells


def _values(rows: list[Row], measure: str) -> list[float]:
    return [r[measure] for r in rows if r.get(measure) is not None]


def _row(name: str, values: Sequence[str]) -> str:
    return f"| {name} | " + " | ".join(values) + " |"


def _spread(values: list[float]) -> str:
    if not values:
        return "-"
    spread = f" ± {stats.stdev(values):.4f}" if len(values) > 1 else ""
    return f"{stats.mean(values):.4f}{spread}"


def _geometric(shares: list[float]) -> str:
    return f"{math.exp(stats.mean(map(math.log, shares))):.3f}" if shares else "-"


def _key(row: Row) -> Key:
    return row["model"], row["method"], row["ratio"], row["seed"]


def parser() -> argparse.ArgumentParser:
    """The options."""
    made = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    made.add_argument("--models", nargs="+", default=["eval/tiny-qwen2-moe"])
    made.add_argument("--calibration", default="eval/text/calibration")
    made.add_argument("--heldout", default="eval/text/heldout")
    made.add_argument("--unseen", type=Path, help="held-out text of other domains")
    made.add_argument("--samples", type=int, default=256)
    made.add_argument("--length", type=int, default=256)
    made.add_argument("--heldout-samples", type=int, default=400)
    made.add_argument("--agreement-samples", type=int, default=40, help="held-out windows")
    made.add_argument("--batch-size", type=int, default=8)
    made.add_argument("--device", default="cpu")
    made.add_argument("--ratios", type=float, nargs="+", default=[0.25, 1 / 3, 0.5, 0.75])
    made.add_argument("--methods", nargs="+", default=METHODS)
    made.add_argument("--evaluations", type=int, default=200, help="of a search over budgets")
    made.add_argument("--reference", default="reap/uniform")
    made.add_argument("--seeds", type=int, default=5)
    made.add_argument("--jobs", type=int, default=1, help="processes side by side")
    made.add_argument("-o", "--output", type=Path, default=Path("eval/compare.jsonl"))
    made.add_argument("--show", action="store_true", help="measure nothing, show what is there")
    made.add_argument("--table", type=Path, help="Markdown")
    made.add_argument("--csv", type=Path)
    made.add_argument("--plot", type=Path, help="PNG, SVG or PDF")
    return made


if __name__ == "__main__":
    main()
