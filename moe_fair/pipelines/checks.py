"""What a recipe's settings stand for, and whether they can be met, before anything is measured."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from moe_fair.core.allocate import allocator, inputs_of
from moe_fair.core.plan import ModelSize, Plan, make_plan
from moe_fair.core.recipe import Recipe
from moe_fair.core.units import Scores, UnitGroup
from moe_fair.engines.processes import processes
from moe_fair.moe.device_map import check_map, read_map
from moe_fair.moe.statistics import zeros
from moe_fair.pipelines.early_checks import target
from moe_fair.pipelines.methods import method as method
from moe_fair.pipelines.methods import method_name as method_name
from moe_fair.pipelines.mtp_heads import choose_heads, head_facts, size_without
from moe_fair.pipelines.serving import refusal, wanted_by

if TYPE_CHECKING:  # a plan is made without transformers
    from moe_fair.moe.calibration_text import CalibrationSet
    from moe_fair.moe.checkpoint_source import Checkpoint


def check_target(recipe: Recipe, every: tuple[UnitGroup, ...], before: ModelSize) -> None:
    """The budget lies between the fewest experts that routing allows and all of them.

    Args:
        every: the groups that are cut; of those that follow only the size counts.
        before: size of the model with all of their units.

    Raises:
        ValueError: it does not; says the range, and why it ends there.
    """
    wanted = target(recipe)
    groups = tuple(g for g in every if not g.follows)
    most, least = max(g.size for g in groups), min(g.floor for g in groups)
    why = floor_reason(min(groups, key=lambda g: g.floor))
    if recipe.experts is not None and not least <= recipe.experts <= most:
        end = "the model has no more" if recipe.experts > most else why
        raise ValueError(f"--experts {recipe.experts:g}: {end}; choose {least} to {most} per layer")
    total, floor = sum(g.size for g in groups), sum(g.floor for g in groups)
    if recipe.total is not None and not floor <= recipe.total <= total:
        end = "" if recipe.total > total else f": {why}"
        raise ValueError(
            f"--total {recipe.total}: {len(groups)} layers can keep {floor} to {total} experts{end}"
        )
    if recipe.ratio is not None and total - round(recipe.ratio * total) < floor:
        raise ValueError(
            f"--ratio {recipe.ratio:g}: {why}; at most {(total - floor) / total:.3g} can leave"
        )
    fewest = before.without(every, {g.name: g.floor for g in every})
    for unit in ("parameters", "bytes"):
        limit, smallest = getattr(wanted, unit), getattr(fewest, unit)
        if limit is not None and limit < smallest:
            raise ValueError(
                f"--size {limit:,} {unit} is out of reach: {why}, and with no more than that in "
                f"any layer the model still has {smallest:,} {unit}"
            )
    if recipe.min_experts > most:
        raise ValueError(f"--min-experts {recipe.min_experts}: layers have {most} experts")


def floor_reason(group: UnitGroup) -> str:
    """Why routing can work with no fewer experts than a layer's floor."""
    if group.blocks == 1:
        return f"the router picks top {group.floor}"
    return (
        f"the router first picks some of {group.blocks} groups of experts, and each group must "
        f"keep {group.floor // group.blocks}: those picked must hold its top k, and a group is "
        "judged by its best two"
    )


def check_plan_settings(recipe: Recipe, source: Checkpoint) -> Plan:
    """Everything about the plan that can be checked before anything is measured.

    Returns:
        a plan of the right total from placeholder scores: its size is that of the result.
    """
    rule_name = method(recipe)[2]
    rule = allocator(rule_name)
    facts = head_facts(source)
    choice = choose_heads(recipe, facts, rule_name)
    groups = tuple(g for g in source.groups if choice == "cut" or not g.follows)
    before = size_without(source.size, choice, facts)
    check_target(recipe, groups, before)
    # whether a target can be met depends on no score: any will do to try it
    placeholder = Scores(
        "placeholder", {g.name: torch.arange(g.size, dtype=torch.float64) for g in groups}
    )
    return planned(
        recipe,
        source.config.model_type,
        groups,
        placeholder,
        placeholder,
        allocator=rule_name,
        before=before,
        costs={g.name: np.zeros(g.size + 1) for g in groups},
        inputs=inputs_of(rule, (zeros(g, getattr(rule, "needs", ())) for g in groups)),
    )


def planned(
    recipe: Recipe,
    model_type: str | None,
    groups: tuple[UnitGroup, ...],
    removal: Scores,
    protection: Scores | None,
    /,
    **known: Any,
) -> Plan:
    """`make_plan` with the target and the limits of a recipe.

    Raises:
        ValueError: the target cannot be met, or the engines of --for serve no such plan.
    """
    held = wanted_by(recipe, model_type, groups)
    try:
        return make_plan(
            groups,
            removal,
            protection,
            target=target(recipe),
            min_units=recipe.min_experts,
            multiple_of=recipe.multiple_of,
            counts=held.counts,
            equal=held.equal,
            **known,
        )
    except ValueError as e:
        raise refusal(recipe, e) from e


def check_device_map(device_map: str | None, engine: str, source: Checkpoint) -> None:
    """A device map is of one process with the resident engine, and fits the model.

    Raises:
        ValueError: it is not, or it does not.
    """
    if device_map is None:
        return
    if processes() > 1:
        raise ValueError(
            f"--device-map spreads the model of one process, and {processes()} were started, each "
            "with a device of its own; start one, or leave --device-map out"
        )
    if engine == "streaming":
        raise ValueError(
            "--device-map is for the resident engine; streaming holds one layer at a time on one "
            "device: leave one of the two out"
        )
    check_map(device_map, read_map(device_map), source.skeleton)


def check_disk(need: int, output: Path, folder: Path) -> None:
    """The result fits on the disk that it shall lie on.

    Args:
        folder: where it is made.

    Raises:
        ValueError: it does not; says how much is needed and free.
    """
    free = free_space(folder)
    if need > free:
        raise ValueError(
            f"{output} needs {need / 1e9:.1f} GB and {free / 1e9:.1f} GB are free in "
            f"{_nearest_folder(folder)}; make room or write elsewhere"
        )


def free_space(folder: Path) -> int:
    """Free bytes of the disk that a directory lies on, or would."""
    return shutil.disk_usage(_nearest_folder(folder)).free


def _nearest_folder(folder: Path) -> Path:
    folder = folder.absolute()
    while not folder.exists():
        folder = folder.parent
    return folder


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


def check_embedding(source: Checkpoint) -> None:
    """The embedding that config.json makes is the one in the files, which are not loaded for it.

    Raises:
        ValueError: their shapes differ; says both.
    """
    rows = _embedding(source)
    if rows is None:
        return
    name, shape = rows
    for t in source.tensors:
        # an embedding lies in no layer: the many tensors that do need not be asked
        layered = any(part.isdigit() for part in t.name.split("."))
        if not layered and source.find(t.name).name == name and t.shape != shape:
            raise ValueError(
                f"{source.model}: config.json makes {name} {list(shape)} (vocab_size and "
                f"hidden_size), and the files hold {list(t.shape)}; restore the model's config.json"
            )


def check_tokens(text: CalibrationSet, source: Checkpoint) -> None:
    """The model has an embedding for every token of the text.

    Raises:
        ValueError: the tokenizer gives ids that it has not.
    """
    rows = _embedding(source)
    most = max((max(ids) for ids, _ in text.sequences if ids), default=-1)
    if rows is not None and most >= rows[1][0]:
        raise ValueError(
            f"{source.model}: its tokenizer gives token {most}, and {rows[0]} has {rows[1][0]} "
            "rows (vocab_size); the tokenizer is another model's"
        )


def _embedding(source: Checkpoint) -> tuple[str, tuple[int, ...]] | None:
    """Name and shape of the input embedding, where the model says which it is."""
    try:
        weight = getattr(source.skeleton.get_input_embeddings(), "weight", None)  # type: ignore[operator]
    except NotImplementedError:
        return None
    named = source.skeleton.named_parameters(remove_duplicate=False)
    return next(((n, tuple(p.shape)) for n, p in named if p is weight), None)


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
