"""How much text is enough, and does agreement between its halves foresee what more brings?

    python eval/text_amount.py --models eval/tiny-qwen2-moe lab/mixtral -o lab/amount.jsonl
    python eval/text_amount.py --own .7 1 1.2 --unseen lab/unseen -o lab/own_amount.jsonl

A text of four times `--samples` is cut into eight parts, each of neighbouring sequences of every
domain, so that parts hold other documents. Statistics add up: one run over each part tells what
would be removed by 1, 2 and 4 times the text. Beside what halves agree on, as `plan` says it (every
other sequence) and by the method's own score on the first parts and the last, stand the share of
the removed experts that twice and four times the text remove as well, and the increase of the loss
by real cuts without a repair.

`--own` measures texts that the model samples itself at these temperatures, by transformers' own
`generate` from the start token, documents of up to `--length` tokens, nothing replaced: what
`-c self` does at temperature 1, but for loops. `eval/unseen_text.py` makes what `--unseen` takes.
"""

from __future__ import annotations

import argparse
import copy
import json
import statistics as stats
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial, reduce
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import nn

    from moe_fair.core.plan import Plan
    from moe_fair.core.recipe import Recipe
    from moe_fair.core.units import Statistics, UnitGroup
    from moe_fair.engines.batch import Batch
    from moe_fair.moe.calibration_text import CalibrationSet
    from moe_fair.moe.checkpoint_source import Checkpoint

PARTS, AMOUNTS = 8, (1, 2, 4)  # two parts are the text once
RULE, ALLOCATOR = "counterfactual-agreed", "global"  # the default's
Row = dict[str, Any]


def main() -> None:
    """Measure, write a line a model, seed, ratio and amount, and print the means over seeds."""
    args = _arguments()
    rows = []
    args.output.parent.mkdir(parents=True, exist_ok=True)
    for model in args.models:
        for seed in range(args.seeds):
            for heat in args.own or [None]:
                for row in measured(args, model, seed, heat):
                    rows.append(row)
                    with args.output.open("a") as f:
                        f.write(json.dumps(row) + "\n")
    print(table(rows))


def measured(args: argparse.Namespace, model: str, seed: int, heat: float | None) -> Iterator[Row]:
    """Of every ratio and amount of text: what halves agree on, what more text does, the loss.

    Args:
        heat: temperature of own text; None: the given text.
    """
    from moe_fair.core.recipe import Recipe
    from moe_fair.engines.resident import ResidentEngine
    from moe_fair.evaluate import heldout_loss
    from moe_fair.moe.coverage import coverage
    from moe_fair.moe.criteria import criteria
    from moe_fair.moe.surgery import cut
    from moe_fair.pipelines import moe as pipeline

    its = Path(model) / "text"
    texts = [its / n if its.exists() else Path("eval/text") / n for n in ("calibration", "heldout")]
    recipe = Recipe(
        model=model, calibration=(str(texts[0]),), samples=AMOUNTS[-1] * args.samples,
        length=args.length, heldout_samples=args.heldout_samples, seed=seed,
    )  # fmt: skip
    source = pipeline.open_model(recipe)
    whole = source.load("float32", "cpu").eval()
    if heat is None:
        text = pipeline.calibration_set(recipe, source, _quiet)
    else:
        with tempfile.TemporaryDirectory() as folder:
            file = Path(folder) / "own.jsonl"
            write_own(whole, source, recipe, heat, file)
            own = recipe.with_settings({"calibration": (str(file),)})
            text = pipeline.calibration_set(own, source, _quiet)
    judges = {}
    for name, given in {"increase": texts[1], "unseen": args.unseen}.items():
        if given is not None:
            held = pipeline.heldout_set(recipe.with_settings({"heldout": (str(given),)}), source)
            assert held is not None  # the recipe names it
            judges[name] = partial(
                heldout_loss, batches=held.batches(recipe.batch_size), domains=held.domains
            )
    if not all(parts(text)):
        sys.exit(
            f"text_amount: error: --samples {args.samples}: too few for {PARTS} parts; give more"
        )
    batches = text.batches(recipe.batch_size)
    found = [_collected(whole, source.groups, text.domains, _of(batches, p)) for p in parts(text)]
    rule = criteria()[RULE]
    before = {n: loss(ResidentEngine(whole)).domains for n, loss in judges.items()}
    for ratio in args.ratios:
        plans = {n: _plan(_sum(found[: 2 * n]), ratio) for n in AMOUNTS}
        for n, plan in plans.items():
            sides = [_plan(_sum(found[s]), ratio) for s in (slice(0, n), slice(n, 2 * n))]
            covered = coverage(plan.groups, _sum(found[: 2 * n]), rule, None)
            assert covered is not None
            pruned = copy.deepcopy(whole)
            cut(pruned, plan.kept)
            after = {n: loss(ResidentEngine(pruned)).domains for n, loss in judges.items()}
            yield {
                "model": Path(model).name, "seed": seed, "ratio": ratio, "amount": n,
                "text": "given" if heat is None else f"own, {heat:g}",
                "samples": n * args.samples, "length": args.length,
                "halves": covered.halves, "chance": covered.chance, "by_score": agree(*sides),
                "more": {str(m): agree(plan, plans[m]) for m in AMOUNTS if m > n},
                **{k: stats.mean(v[d] - before[k][d] for d in v) for k, v in after.items()},
            }  # fmt: skip


def write_own(model: Any, source: Checkpoint, recipe: Recipe, heat: float, file: Path) -> None:
    """Documents that the model samples at a temperature, a tenth more than are needed."""
    import torch

    from moe_fair.pipelines.own_source import wanted_text

    wanted = wanted_text(recipe.with_settings({"calibration": ("self",)}), source)
    assert wanted is not None  # the recipe names it
    tokenizer, needed = source.tokenizer(), 1.1 * recipe.samples * recipe.length
    torch.manual_seed(recipe.seed)
    with file.open("w", encoding="utf-8") as f:
        while needed > 0:
            start = torch.full((64, 1), wanted.author.start)
            made = model.generate(
                start, attention_mask=torch.ones_like(start), do_sample=True, temperature=heat,
                top_k=0, top_p=1.0, max_new_tokens=recipe.length,
                pad_token_id=tokenizer.eos_token_id,
            )  # fmt: skip
            for text in tokenizer.batch_decode(made, skip_special_tokens=True):
                needed -= len(tokenizer(text)["input_ids"])
                f.write(json.dumps({"text": text}) + "\n")


def parts(text: CalibrationSet) -> list[set[int]]:
    """The sequences of each of eight, by number."""
    members: list[set[int]] = [set() for _ in range(PARTS)]
    for domain in range(len(text.domains)):
        ids = [i for i, (_, d) in enumerate(text.sequences) if d == domain]
        for k, its in enumerate(members):
            its.update(ids[k * len(ids) // PARTS : (k + 1) * len(ids) // PARTS])
    return members


def agree(one: Plan, other: Plan) -> float:
    """Share of the experts that one plan removes which the other removes too."""
    gone = [
        {(g.name, e) for g in p.groups for e in set(range(g.size)) - set(g.kept)}
        for p in (one, other)
    ]
    return len(gone[0] & gone[1]) / len(gone[0])


def table(rows: Sequence[Row]) -> str:
    """Means over seeds."""
    lines = [
        "| model | removed | text | sequences | halves, as shown | halves, by the score "
        "| same with 2 × | same with 4 × | increase | on unseen domains |",
        "|---" * 10 + "|",
    ]
    for key in dict.fromkeys(map(_cell, rows)):
        its = [r for r in rows if _cell(r) == key]
        more = [_mean([_more(r, k) for r in its]) for k in (2, 4)]
        halves = [_mean([r[k] for r in its]) for k in ("halves", "by_score")]
        loss = [_mean([r.get(k) for r in its], 4) for k in ("increase", "unseen")]
        lines.append(f"| {' | '.join([*key, *halves, *more, *loss])} |")
    return "\n".join(lines)


def _cell(row: Mapping[str, Any]) -> tuple[str, ...]:
    size = f"{row['samples']} × {row['length']}"
    return row["model"], f"{100 * row['ratio']:.3g} %", row["text"], size


def _more(row: Mapping[str, Any], times: int) -> float | None:
    return row["more"].get(str(times * row["amount"]))


def _mean(values: Sequence[float | None], digits: int = 3) -> str:
    known = [v for v in values if v is not None]
    return f"{stats.mean(known):.{digits}f}" if known else "-"


def _of(batches: Sequence[Batch], numbers: set[int]) -> list[Batch]:
    """Those of the sequences that have these numbers."""
    found = []
    for b in batches:
        rows = [i for i, n in enumerate(b.sequence_ids.tolist()) if n in numbers]
        if rows:
            its = replace(b, input_ids=b.input_ids[rows], mask=b.mask[rows])
            found.append(replace(its, sequence_ids=b.sequence_ids[rows]))
    return found


def _collected(
    model: nn.Module, groups: Sequence[UnitGroup], domains: tuple[str, ...], part: Sequence[Batch]
) -> Statistics:
    """What the default's score needs, of one part."""
    from moe_fair.engines.resident import ResidentEngine
    from moe_fair.moe.blocks import find_blocks
    from moe_fair.moe.collector import ExpertCollector
    from moe_fair.moe.criteria import criteria
    from moe_fair.moe.statistics import collecting

    wanted = collecting(criteria()[RULE].needs)
    with ExpertCollector(find_blocks(model), groups, domains, wanted) as collector:
        ResidentEngine(model).run(list(part), collector, backward=True)
    return collector.statistics()


def _sum(found: Sequence[Statistics]) -> Statistics:
    return reduce(lambda a, b: a.merge(b), found).rounded()


def _plan(statistics: Statistics, ratio: float) -> Plan:
    from moe_fair.core.plan import ModelSize, Target, make_plan
    from moe_fair.moe.criteria import criteria

    scores = criteria()[RULE](statistics)
    groups, target = statistics.groups, Target(ratio=ratio)
    size = ModelSize(10**12, 10**12)  # of the file's size nothing is asked here
    return make_plan(groups, scores, None, target=target, allocator=ALLOCATOR, before=size)


def _quiet(_: str) -> None:
    """Nothing is said."""


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--models", nargs="+", default=["eval/tiny-qwen2-moe"])
    parser.add_argument("--own", type=float, nargs="+", help="temperatures, for the given text")
    parser.add_argument("--unseen", type=Path, help="a folder of other domains to judge on")
    parser.add_argument("--samples", type=int, default=32, help="sequences of the text once")
    parser.add_argument("--length", type=int, default=256)
    parser.add_argument("--heldout-samples", type=int, default=120)
    parser.add_argument("--ratios", type=float, nargs="+", default=[0.5, 0.25])
    parser.add_argument("--seeds", type=int, default=2)
    parser.add_argument("-o", "--output", type=Path, default=Path("lab/amount.jsonl"))
    return parser.parse_args()


if __name__ == "__main__":
    main()
