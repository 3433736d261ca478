"""Which plan should a trial take? Each plan that a rule would take, repaired in full and judged.

    python eval/trial_rules.py --unseen lab/unseen --models eval/tiny-qwen2-moe lab/qwen3_moe \
        --ratios .5 .25 --seeds 2 --samples 96 --heldout-samples 120 -o lab/lab.jsonl

The default with own text beside the given (`default@+.25` of `eval/compare.py`), its trial as it
is. The sequences that neither teach the fits nor are held back from the statistics judge as
well, to see what more judges would say; the default's rule does not see them.
Rules:

- `least`: the plan that loses least: the default's;
- `margin`: a rival's plan where it loses less by a tenth and a standard error;
- `half`: by a twentieth and half of a standard error;
- `least-all`, `margin-all`: the same, all sequences judging.

Rows are those of `eval/lab.py`: `default@+.25` is what `least` takes, `default=PLAN@+.25` another
plan that some rule takes, and `judged` holds every finalist's change and its standard error.
"""

from __future__ import annotations

import json
import math
import os
import statistics as stats
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import compare

if TYPE_CHECKING:
    from torch import Tensor, nn

    from moe_fair.core.plan import Plan
    from moe_fair.core.recipe import Recipe
    from moe_fair.evaluate import HeldoutLoss
    from moe_fair.moe.calibration_text import CalibrationSet
    from moe_fair.moe.checkpoint_source import Checkpoint

TEXT = "+.25"
RULES = ("least", "margin", "half", "least-all", "margin-all")
Judged = dict[str, list[tuple[str, float, float]]]  # by whom -> plan, change, standard error


class Trials(compare.Subject):
    """A model with one text, whose trials' plans and losses are kept."""

    def __init__(self, args: Any, model: str, seed: int) -> None:
        super().__init__(args, model, seed, TEXT)
        self.plans: dict[str, Plan] = {}
        self.judged: Judged = {}
        self.taken: str | None = None  # instead of the rule's
        self.bases: dict[str, HeldoutLoss] = {}

    def loss(self, model: nn.Module, text: CalibrationSet | None) -> HeldoutLoss:
        """The original's are measured once."""
        if model is not self.model or text is None:
            return super().loss(model, text)
        if text.digest not in self.bases:
            self.bases[text.digest] = super().loss(model, text)
        return self.bases[text.digest]

    def _tried(self, chosen: Recipe) -> Plan:
        from moe_fair.pipelines import plan_selection

        if self.taken is not None:
            return self.plans[self.taken]
        real, rule = plan_selection.losses_of, plan_selection.best_of
        more: list[Tensor] = []

        def losses_of(
            recipe: Recipe, source: Checkpoint, text: CalibrationSet, plans: Sequence[Plan],
            home: Path, say: Any, teaching: CalibrationSet | None = None,
        ) -> tuple[Tensor, Tensor]:  # fmt: skip
            if teaching is None:
                return real(recipe, source, text, plans, home, say, teaching)
            used = {*text.sequences, *teaching.sequences}
            rest = tuple(s for s in self.text.sequences if s not in used)
            both = replace(text, sequences=(*text.sequences, *rest))
            losses, counts = real(recipe, source, both, plans, home, say, teaching)
            order = [i for b in both.batches(recipe.batch_size) for i in b.sequence_ids.tolist()]
            own = [i for b in text.batches(recipe.batch_size) for i in b.sequence_ids.tolist()]
            more[:] = [losses, counts]
            where = [order.index(i) for i in own]
            return losses[:, where], counts[where]

        def best_of(tried: Sequence[Any]) -> Any:
            self.plans = {t.name: t.plan for t in tried}
            losses, counts = more
            tokens = float(counts.sum())
            self.judged = {
                "held back": [(t.name, t.change, t.stderr) for t in tried],
                "all": [
                    (t.name, plan_selection._change(losses[p], losses[0], tokens),
                     plan_selection._stderr(losses[p] - losses[1], tokens))
                    for p, t in enumerate(tried, 1)
                ],
            }  # fmt: skip
            return rule(tried)

        plan_selection.losses_of, plan_selection.best_of = losses_of, best_of
        try:
            return super()._tried(chosen)
        finally:
            plan_selection.losses_of, plan_selection.best_of = real, rule


def takes(rule: str, judged: Judged) -> str:
    """The plan that a rule takes."""
    kind, _, who = rule.partition("-")
    own, *rivals = judged["all" if who else "held back"]
    part = {"margin": 1.0, "half": 0.5, "least": 0.0}[kind]
    least = [
        r for r in rivals if r[1] < own[1] - max(0.1 * part * abs(own[1]), part * r[2])
    ]  # fmt: skip
    return min([own, *least], key=lambda r: r[1])[0]


def measure(args: Any, model: str, seed: int) -> Iterator[compare.Row]:
    """The rows of one model and seed, each ratio's trial and then the plans that rules take."""
    done = {compare._key(r) for r in compare.read(args.output)}
    name, usual = Path(model).name, f"default@{TEXT}"
    wanted = [r for r in args.ratios if (name, usual, r, seed) not in done]
    if not wanted:
        return
    subject = Trials(args, model, seed)
    for ratio in wanted:
        subject.taken = None
        [row] = subject.rows([("default", ratio)])
        found = {rule: takes(rule, subject.judged) for rule in RULES}
        taken = row["taken"]
        assert found["least"] == taken  # the rule here is the default's
        yield {**row, "method": usual, "judged": subject.judged, "rules": found}
        for plan in sorted(set(found.values()) - {taken}):
            subject.taken = plan
            [row] = subject.rows([("default", ratio)])
            yield {**row, "method": f"default={plan}@{TEXT}"}


def table(rows: list[compare.Row]) -> str:
    """What each rule takes and what stays of it, a line a cell, over the rule as it is."""
    cells = {(r["model"], r["ratio"], r["seed"], r["method"]): r for r in rows}
    lines = ["| model | removed | seed | " + " | ".join(RULES) + " |", "|---" * 8 + "|"]
    shares: dict[str, list[float]] = {r: [] for r in RULES}
    others: dict[str, list[float]] = {r: [] for r in RULES}
    for (model, ratio, seed, _), row in cells.items():
        if "rules" not in row:
            continue
        line = []
        for rule, plan in row["rules"].items():
            way = "default" if plan == row["taken"] else f"default={plan}"
            its = cells[model, ratio, seed, f"{way}@{TEXT}"]
            mine, other, usual = (
                stats.mean(d.values()) for d in (its["domains"], its["unseen"], row["domains"])
            )
            line.append(f"{plan} {mine:.4f}, {other:.4f} ({max(its['unseen'].values()):.3f})")
            others[rule].append(other)
            if mine > 0 < usual:
                shares[rule].append(mine / usual)
        lines.append(f"| {model} | {100 * ratio:g} % | {seed} | {' | '.join(line)} |")
    means = [
        f"{math.exp(stats.mean(map(math.log, s))):.3f}, {stats.mean(others[r]):.4f}"
        for r, s in shares.items()
        if s
    ]
    return "\n".join([*lines, f"| geometric mean; others' mean | | | {' | '.join(means)} |"])


def main() -> None:
    """Measure what is missing, then print the table."""
    made = compare.parser()
    made.description = __doc__
    args = made.parse_args()
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    args.output.parent.mkdir(parents=True, exist_ok=True)
    for seed in range(args.seeds) if not args.show else ():
        for model in args.models:
            for row in measure(args, model, seed):
                with args.output.open("a") as f:
                    f.write(json.dumps(row) + "\n")
    print(table([r for r in compare.read(args.output) if r["seed"] < args.seeds]))


if __name__ == "__main__":
    main()
