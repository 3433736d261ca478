"""Search over layer budgets by evolution on agreement (EvoESAP, arXiv 2603.06003).

    moe-fair calibrate MODEL -c TEXT -o stats
    python eval/evoesap.py MODEL stats --experts 40 --method reap -c TEXT -o plan.json
    moe-fair prune MODEL --plan plan.json -o out

The removal order within each layer is the method's and stays; evolution moves the budget between
layers (`moe_fair.core.evolution`). A candidate's fitness is the expected speculative acceptance
Σ min(p, q) between the original and the model really cut, on the search text (`moe_fair.evaluate.
agreement`). Original and candidates are in memory together, so this is for models of which two fit.
Every evaluation is one run of both over the search text.
"""

from __future__ import annotations

import argparse
import copy
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np

from moe_fair.core.evolution import Candidate, evolve
from moe_fair.core.plan import Plan
from moe_fair.core.plan_checks import common_divisors
from moe_fair.core.ranking import block_order, depths
from moe_fair.core.recipe import Recipe
from moe_fair.core.units import Statistics
from moe_fair.engines.resident import ResidentEngine
from moe_fair.evaluate.agreement import agreement
from moe_fair.moe.surgery import cut
from moe_fair.pipelines import moe as pipeline
from moe_fair.pipelines.checks import check_same_model


def main(arguments: list[str] | None = None) -> None:
    """Search, and write the plan."""
    args = _arguments(arguments)
    recipe = Recipe(
        model=args.model, calibration=tuple(args.calibration), samples=args.samples,
        length=args.length, seed=args.seed, experts=args.experts, total=args.total,
        ratio=args.ratio, method=args.method, batch_size=args.batch_size,
    )  # fmt: skip
    statistics = Statistics.load(args.statistics)
    made = search(recipe, statistics, evaluations=args.evaluations)
    made.save(args.output)
    about = made.explanation
    print(
        f"{args.output}: acceptance {about['acceptance_start']:.4f} -> {about['acceptance']:.4f} "
        f"in {about['evaluations']} evaluations; kept {[len(g.kept) for g in made.groups]}"
    )


def search(recipe: Recipe, statistics: Statistics, *, evaluations: int) -> Plan:
    """The method's own plan with the budget that evolution found.

    Args:
        recipe: model, method, target and search text.
    """
    source = pipeline.open_model(recipe)
    check_same_model(statistics.fingerprint, source, "statistics were")
    plan = pipeline.plan(statistics, recipe)
    text = pipeline.calibration_set(recipe, source, lambda line: print(line, file=sys.stderr))
    batches = text.batches(recipe.batch_size)
    groups = {g.name: g for g in statistics.groups}
    units = [groups[g.name] for g in plan.groups]
    orders = [
        block_order(np.array(g.removal), u.blocks) for g, u in zip(plan.groups, units, strict=True)
    ]
    allowed = [depths(u, recipe.min_experts, recipe.multiple_of) for u in units]
    steps = {int(a[1] - a[0]) for a in allowed if len(a) > 1}
    if len(steps) > 1:
        raise ValueError(f"layers advance in different steps {sorted(steps)}; nothing can move")
    for g, order in zip(plan.groups, orders, strict=True):
        if g.kept != sorted(order[g.depth :].tolist()):
            raise ValueError(
                f"--method {recipe.method} chooses sets of experts at every budget anew and has no "
                "removal order to search along; give a criterion (reap, frequency, ean)"
            )
    model = source.load(recipe.dtype, recipe.device)
    original = ResidentEngine(model)

    def kept(candidate: Candidate) -> dict[str, list[int]]:
        return {
            u.name: sorted(order[d:].tolist())
            for u, order, d in zip(units, orders, candidate, strict=True)
        }

    def fitness(candidate: Candidate) -> float:
        pruned = copy.deepcopy(model)
        cut(pruned, kept(candidate))
        found = agreement(original, ResidentEngine(pruned), batches, text.domains).mean.acceptance
        print(f"{found:.5f}  {[u.size - d for u, d in zip(units, candidate, strict=True)]}",
              file=sys.stderr, flush=True)  # fmt: skip
        return found

    found = evolve(
        [g.depth for g in plan.groups],
        [int(a[0]) for a in allowed],
        [int(a[-1]) for a in allowed],
        fitness,
        evaluations=evaluations,
        steps=steps.pop() if steps else 1,
        seed=recipe.seed,
    )
    chosen = kept(found.best)
    return replace(
        plan,
        groups=[replace(g, kept=chosen[g.name], tod=None) for g in plan.groups],
        allocator="evoesap",
        explanation={
            "acceptance_start": found.start, "acceptance": found.fitness,
            "evaluations": len(found.history), "search_text": text.digest,
        },
        after=plan.before.without(tuple(units), {n: len(ids) for n, ids in chosen.items()}),
        expert_parallel=common_divisors([len(ids) for ids in chosen.values()]),
    )  # fmt: skip


def _arguments(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("model")
    parser.add_argument("statistics", type=Path)
    parser.add_argument("-o", "--output", type=Path, required=True, help="the plan")
    parser.add_argument("-c", "--calibration", action="append", required=True, help="search text")
    target = parser.add_mutually_exclusive_group(required=True)
    target.add_argument("--experts", type=float)
    target.add_argument("--total", type=int)
    target.add_argument("--ratio", type=float)
    parser.add_argument("--method", default="reap", help="gives order and starting budget")
    parser.add_argument("--evaluations", type=int, default=1600, help="the paper's 32 × 50")
    parser.add_argument("--samples", type=int, default=64)
    parser.add_argument("--length", type=int, default=512)
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--seed", type=int, default=0)
    return parser.parse_args(arguments)


if __name__ == "__main__":
    main()
