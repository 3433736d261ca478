"""What a run of `prune` takes of the disk that its result shall lie on, before it starts."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from moe_fair.core.output import Place
from moe_fair.core.plan import ModelSize
from moe_fair.core.recipe import Recipe
from moe_fair.engines.device import pick_device
from moe_fair.moe.checkpoint_source import Checkpoint
from moe_fair.moe.engine_choice import weight_dtype
from moe_fair.moe.predictions import TOP
from moe_fair.pipelines.checks import check_disk


def kept_on_average(source: Checkpoint, cut: ModelSize) -> int:
    """Experts that a layer keeps in a model of this size, on average, as every router allows."""
    groups = source.groups
    size = sum(g.size * g.unit_parameters for g in groups)
    group = groups[0]
    share = 1 - (source.size.parameters - cut.parameters) / size
    count = round(group.size * share) // group.blocks * group.blocks
    return max(group.floor, min(count, group.size))


def disk_needs(
    recipe: Recipe, source: Checkpoint, after: ModelSize, *, rewrites: int, tokens: int
) -> dict[str, int]:
    """Bytes by what they are for.

    Args:
        after: size of the result, as it is stored.
        rewrites: 1 where experts are repaired or merged, 2 where they are both.
        tokens: of the calibration text.
    """
    found = {"result": after.bytes}
    if rewrites:  # every tensor of it, until the result is whole
        each = sum(g.unit_bytes for g in source.groups)
        if source.packing is not None:  # packed, and in the type of the weights in memory
            item = weight_dtype(source, recipe.dtype, pick_device(recipe.device)).itemsize
            each += item * sum(g.unit_parameters for g in source.groups)
        found["meanwhile"] = rewrites * each * kept_on_average(source, after)
    if recipe.heal:  # the original's predictions, and what is kept
        found["healing"] = tokens * TOP * 8 + after.bytes
    return found


def check_room(needs: Mapping[str, int], output: Path, place: Place, work: Path) -> str:
    """All of it fits; what a killed run has left there counts as room.

    Returns:
        a line that says how much it is.

    Raises:
        ValueError: it does not fit.
    """
    there = sum(_held(folder) for folder in (place.partial, work))
    check_disk(max(0, sum(needs.values()) - there), output, place.partial)
    beside = sum(needs.values()) - needs["result"]
    more = f", and {beside / 1e9:.2f} GB beside it until it is whole" if beside else ""
    return f"disk: about {needs['result'] / 1e9:.2f} GB for the result{more}"


def _held(folder: Path) -> int:
    """Bytes of the files in a folder."""
    files = (p for p in folder.rglob("*") if p.is_file() and not p.is_symlink())
    return sum(p.stat().st_size for p in files)
