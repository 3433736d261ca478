"""What a recipe's method stands for: a removal score, perhaps a protection score, an allocator."""

from __future__ import annotations

from moe_fair.core.allocate import allocator, allocators
from moe_fair.core.criterion import Criterion
from moe_fair.core.recipe import Recipe
from moe_fair.core.registry import pick
from moe_fair.moe.criteria import criteria, criterion
from moe_fair.moe.repairs import repair
from moe_fair.pipelines.choices import METHODS
from moe_fair.pipelines.serving import allocator_for

Method = tuple[Criterion, Criterion | None, str]
# methods that pair a removal score with |Taylor|, by ToD
MERGING = {"merge": "frequency", "ream": "reap"}  # what merging has, where none is named
PAIRS = {"fair": "routed-mass", "fair-u": "u-score"}


def method(recipe: Recipe) -> tuple[Criterion, Criterion | None, str]:
    """Removal score, protection score and allocator that a recipe's method stands for.

    `second-order`, the default, takes out what adds least to the loss by the second order of exact
    counterfactual outputs, wherever it lies, and by the first order as far as calibration domains
    agree on it (evidence: eval/LAB.md). `fair` is FAIR-Pruner's rule:
    routed output mass against |Taylor|, allocated by ToD; `fair-u` its pairing to the letter,
    U-Score between calibration domains against |Taylor|. The name of a criterion is that criterion
    with a uniform budget, as its paper has it, or with the allocator of the same name. HC-SMoE's
    merging chooses its experts itself and only takes its budget from here: uniform, as its paper
    has it; REAM's takes its centroids, too.
    """
    name, parts = method_name(recipe), recipe.parts
    rule, wanted = parts["allocate"], parts["protection"]
    if rule is not None and (only := getattr(allocator(rule), "removal", None)) is not None:
        given = recipe.removal or (parts["method"] if parts["method"] in criteria() else None)
        if given not in (None, only):
            raise ValueError(
                f"--allocate {rule} chooses the experts itself, as {only} counts them, and takes "
                f"no {given}; leave it out"
            )
        return criterion(only), criterion(wanted) if wanted else None, rule
    if name == "second-order":
        removal, rule = recipe.removal or "counterfactual-agreed", rule or "global"
    elif name in PAIRS:
        removal, rule = recipe.removal or PAIRS[name], rule or "tod"
    elif name in criteria():
        removal, rule = (
            recipe.removal or name,
            rule or (name if name in allocators() else "uniform"),
        )
    else:
        pick({**METHODS, **criteria()}, name, "method")
        raise AssertionError
    rule = allocator_for(rule, recipe.serve, named=parts["allocate"] is not None)
    paired = allocator(rule).needs_protection or wanted or name in PAIRS
    return criterion(removal), criterion(wanted or "taylor") if paired else None, rule


def method_name(recipe: Recipe) -> str:
    """The method that is named, without its other parts, or the default."""
    if (name := recipe.parts["method"]) is not None:
        return name
    if recipe.tolerance is not None:
        return "fair"
    return MERGING.get(recipe.reduce, "second-order")


def check_names(recipe: Recipe, repairs: bool = False) -> None:
    """The rules that a recipe names are there.

    Args:
        repairs: the repair's name counts as well.

    Raises:
        ValueError: one is not; names the nearest.
    """
    method(recipe)
    if recipe.curves is not None:
        criterion(recipe.curves)
    wanted = recipe.parts["repair"]
    if repairs and wanted not in (None, "none"):
        repair(wanted)
