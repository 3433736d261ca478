"""What a recipe's settings stand for, and whether they can be met, before anything is measured."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import torch

from moe_fair.core.allocate import allocator, allocators
from moe_fair.core.criterion import Criterion
from moe_fair.core.plan import Plan, Target, make_plan
from moe_fair.core.registry import pick
from moe_fair.core.units import Scores, UnitGroup
from moe_fair.distributed import processes
from moe_fair.moe.criteria import criteria, criterion
from moe_fair.moe.load import Checkpoint
from moe_fair.moe.placement import check_map, read_map
from moe_fair.recipe import Recipe, parse_size

# methods that pair a removal score with |Taylor|, by ToD
PAIRS = {"fair": "routed-mass", "fair-u": "u-score"}


def with_needs(recipe: Recipe, *others: Recipe) -> Recipe:
    """The recipe that also collects what its method, and others', need beyond the usual."""
    used = [c for r in (recipe, *others) for c in method(r)[:2]]
    if recipe.curves is not None:
        used.append(criterion(recipe.curves))
    needed = {n for c in used if c is not None for n in c.needs}
    extra = {"sketch": "u_score", "gated_gram": "gram", "alone_change": "alone"}
    return recipe.with_settings({setting: True for n, setting in extra.items() if n in needed})


def method(recipe: Recipe) -> tuple[Criterion, Criterion | None, str]:
    """Removal score, protection score and allocator that a recipe's method stands for.

    `second-order`, the default, takes out what adds least to the loss by the second order of exact
    counterfactual outputs, wherever it lies, and by the first order as far as calibration domains
    agree on it (evidence: eval/LAB.md). `fair` is FAIR-Pruner's rule:
    routed output mass against |Taylor|, allocated by ToD; `fair-u` its pairing to the letter,
    U-Score between calibration domains against |Taylor|. The name of a criterion is that criterion
    with a uniform budget, as its paper has it, or with the allocator of the same name. Merging
    chooses its experts itself and only takes its budget from here: uniform, as its paper has it.
    """
    name = method_name(recipe)
    rule = recipe.allocate
    if rule is not None and (only := getattr(allocator(rule), "removal", None)) is not None:
        given = recipe.removal or (recipe.method if recipe.method in criteria() else None)
        if given not in (None, only):
            raise ValueError(
                f"--allocate {rule} chooses the experts itself, as {only} counts them, and takes "
                f"no {given}; leave it out"
            )
        return criterion(only), criterion(recipe.protection) if recipe.protection else None, rule
    if name == "second-order":
        removal, rule = recipe.removal or "counterfactual-agreed", recipe.allocate or "global"
    elif name in PAIRS:
        removal, rule = recipe.removal or PAIRS[name], recipe.allocate or "tod"
    elif name in criteria():
        removal, rule = (
            recipe.removal or name,
            recipe.allocate or (name if name in allocators() else "uniform"),
        )
    else:
        pick({"second-order": None, **PAIRS, **criteria()}, name, "method")
        raise AssertionError
    paired = allocator(rule).needs_protection or recipe.protection or name in PAIRS
    protection = recipe.protection or "taylor"
    return criterion(removal), criterion(protection) if paired else None, rule


def method_name(recipe: Recipe) -> str:
    """The method that is named, or the default."""
    if recipe.method is not None:
        return recipe.method
    if recipe.tolerance is not None:
        return "fair"
    return "frequency" if recipe.reduce == "merge" else "second-order"


def target(recipe: Recipe) -> Target:
    """The recipe's one target."""
    size = dict([parse_size(recipe.size)]) if recipe.size else {}
    return Target(
        mean_kept=recipe.experts,
        total=recipe.total,
        ratio=recipe.ratio,
        tolerance=recipe.tolerance,
        **size,
    )


def check_target(recipe: Recipe, groups: tuple[UnitGroup, ...]) -> None:
    """The budget lies between the fewest experts that routing allows and all of them."""
    target(recipe)
    most, least = max(g.size for g in groups), min(g.floor for g in groups)
    if recipe.experts is not None and not least <= recipe.experts <= most:
        why = "the model has no more" if recipe.experts > most else f"the router picks top {least}"
        raise ValueError(f"--experts {recipe.experts:g}: {why}; choose {least} to {most} per layer")
    total, floor = sum(g.size for g in groups), sum(g.floor for g in groups)
    if recipe.total is not None and not floor <= recipe.total <= total:
        raise ValueError(
            f"--total {recipe.total}: {len(groups)} layers can keep {floor} to {total} experts"
        )
    if recipe.min_experts > most:
        raise ValueError(f"--min-experts {recipe.min_experts}: layers have {most} experts")


def check_plan_settings(recipe: Recipe, source: Checkpoint) -> Plan:
    """Everything about the plan that can be checked before anything is measured.

    Returns:
        a plan of the right total from placeholder scores: its size is that of the result.
    """
    removal, protection, rule_name = method(recipe)
    check_target(recipe, source.groups)
    # whether a target can be met depends on no score: any will do to try it
    placeholder = Scores(
        "placeholder", {g.name: torch.arange(g.size, dtype=torch.float64) for g in source.groups}
    )
    trial = make_plan(
        source.groups,
        placeholder,
        placeholder,
        target=target(recipe),
        allocator=rule_name,
        before=source.size,
        min_units=recipe.min_experts,
        multiple_of=recipe.multiple_of,
        costs={g.name: np.zeros(g.size + 1) for g in source.groups},
        rows={g.name: np.zeros((1, g.size)) for g in source.groups},
        grams={g.name: np.zeros((g.size, g.size)) for g in source.groups},
    )
    for rule in (removal, protection):
        for name in rule.needs if rule else ():
            flag = _left_out(recipe, name)
            if flag is not None:
                raise ValueError(
                    f"criterion {rule.name!r} needs {name}, which {flag} leaves out"  # type: ignore[union-attr]
                )
    return trial


def _left_out(recipe: Recipe, statistic: str) -> str | None:
    """The flag by which this statistic is not collected, if it is not."""
    gradient = statistic.startswith("taylor") or statistic in (
        "rows", "removed_first", "removed_first_sq", "removed_gram",
    )  # fmt: skip
    if gradient and not recipe.taylor:
        return "--no-taylor"
    if statistic.startswith("removed") and not recipe.counterfactual:
        return "--no-counterfactual"
    return None


def check_device_map(recipe: Recipe, source: Checkpoint) -> None:
    """A device map is of one process with the resident engine, and fits the model.

    Raises:
        ValueError: it is not, or it does not.
    """
    if recipe.device_map is None:
        return
    if processes() > 1:
        raise ValueError(
            f"--device-map spreads the model of one process, and {processes()} were started, each "
            "with a device of its own; start one, or leave --device-map out"
        )
    if recipe.engine == "streaming":
        raise ValueError(
            "--device-map is for the resident engine; streaming holds one layer at a time on one "
            "device: leave one of the two out"
        )
    check_map(recipe.device_map, read_map(recipe.device_map), source.skeleton)


def check_disk(need: int, output: Path) -> None:
    """The result fits on the disk that it shall lie on.

    Raises:
        ValueError: it does not; says how much is needed and free.
    """
    folder = output.absolute().parent
    while not folder.exists():
        folder = folder.parent
    free = shutil.disk_usage(folder).free
    if need > free:
        raise ValueError(
            f"{output} needs {need / 1e9:.1f} GB and {free / 1e9:.1f} GB are free in {folder}; "
            "make room or write elsewhere"
        )


def check_same_model(fingerprint: dict[str, str], source: Checkpoint, what: str) -> None:
    """The statistics or plan were made from this very model."""
    for part in ("model", "tokenizer"):
        if fingerprint.get(part) != source.fingerprint[part]:
            raise ValueError(
                f"the {what} made from another {part} than that of {source.model}; "
                "calibrate this model, or give the one they belong to"
            )
    check_hash_layers(fingerprint, source.hash_layers, what)


def check_hash_layers(fingerprint: dict[str, str], hash_layers: str, what: str) -> None:
    """The statistics or plan were made with this choice for layers with a table of token ids."""
    made = fingerprint.get("hash_layers", "keep")
    if made != hash_layers:
        raise ValueError(
            f"the {what} made with --hash-layers {made}, and --hash-layers {hash_layers} is asked "
            f"for; give --hash-layers {made}, or calibrate again"
        )


def check_same_tokens(a: Checkpoint, b: Checkpoint) -> None:
    """Two models read text as the same tokens, so that their predictions can be compared.

    Raises:
        ValueError: their vocabularies differ.
    """
    if a.tokenizer().get_vocab() != b.tokenizer().get_vocab():
        raise ValueError(
            f"{a.model} and {b.model} have different vocabularies; give the model that this one "
            "was pruned from"
        )
