"""From statistics to a plan: scores, budget and kept ids. Takes milliseconds and no model."""

from __future__ import annotations

from dataclasses import asdict, replace

import torch

from moe_fair.core.allocate import allocator, inputs_of, needs
from moe_fair.core.cost_curves import curves
from moe_fair.core.plan import ModelSize, Plan
from moe_fair.core.recipe import Recipe
from moe_fair.core.units import Statistics
from moe_fair.moe.coverage import coverage
from moe_fair.pipelines.checks import check_hash_layers, check_target, method, planned
from moe_fair.pipelines.collection import check_held, reduction
from moe_fair.pipelines.mtp_heads import choose_heads, head_scores, size_without, with_heads


@torch.inference_mode(False)  # whatever the caller's mode: its tensors may be changed later
def plan(statistics: Statistics, recipe: Recipe) -> Plan:
    """Scores, budget and kept ids from saved statistics; takes milliseconds."""
    removal, protection, rule = method(recipe)
    if recipe.hash_layers is not None:
        check_hash_layers(statistics.fingerprint, recipe.hash_layers, "statistics were")
    size = ModelSize(**statistics.metadata["size"])
    facts, measured = statistics.metadata.get("mtp"), any(g.follows for g in statistics.groups)
    choice = choose_heads(recipe, facts, rule, measured=measured)
    if choice != "cut":
        statistics = statistics.without_following()
    check_target(recipe, statistics.groups, size_without(size, choice, facts))
    check_held(statistics, recipe)
    costs = None
    scores, scored = head_scores(removal, statistics, recipe.weights)
    if needs(allocator(rule), "costs"):
        costs = curves(statistics, removal.name, recipe.weights)
    views = (statistics.view(g, recipe.weights) for g in statistics.groups if not g.follows)
    made = planned(
        recipe,
        statistics.metadata.get("model_type"),
        statistics.groups,
        scores,
        head_scores(protection, statistics, recipe.weights)[0] if protection else None,
        allocator=rule,
        before=size_without(size, choice, facts),
        costs=costs,
        inputs=inputs_of(allocator(rule), views),
        fingerprint=statistics.fingerprint,
        recipe={**statistics.metadata["calibration"], **recipe.planning()},
    )
    made = with_heads(made, size, choice, facts, scored, recipe.mtp)
    found = coverage(made.groups, statistics, removal, recipe.weights)
    if found is not None:
        made = replace(made, explanation={**made.explanation, "coverage": asdict(found)})
    if recipe.reduce == "prune":
        return made
    return reduction(recipe.reduce).merging(made, statistics, recipe.weights)
