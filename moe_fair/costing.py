"""Measuring what each layer's depth costs: loss changes on a share of the calibration text."""

from __future__ import annotations

import hashlib
import json
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from moe_fair.collecting import Say, choose_engine
from moe_fair.core.cost_curves import attach, depths_to_measure
from moe_fair.core.ranking import block_order
from moe_fair.core.units import Statistics
from moe_fair.moe.calibration import CalibrationSet
from moe_fair.moe.criteria import criterion
from moe_fair.moe.load import Checkpoint
from moe_fair.moe.removal import RemovalLosses
from moe_fair.progress import Progress
from moe_fair.recipe import Recipe

Sets = dict[str, list[list[int]]]


def check_curves(recipe: Recipe, source: Checkpoint) -> None:
    """Cost curves can be measured here.

    Raises:
        ValueError: the model would be streamed; says why and what to do.
    """
    chosen = choose_engine(recipe, source)
    if chosen.engine == "streaming":
        raise ValueError(
            f"cost curves run the whole model in memory, and the engine is streaming ({chosen.why})"
            "; use --engine resident (with --max-memory where there is room), or an --allocate "
            "that needs no measured costs (uniform, global, tod)"
        )


def measure_curves(
    recipe: Recipe,
    source: Checkpoint,
    text: CalibrationSet,
    statistics: Statistics,
    removal: str,
    work: Path | None = None,
    say: Say = lambda _: None,
) -> Statistics:
    """The statistics with the cost curves of one removal score.

    Args:
        text: the calibration set, of which `recipe.curve_samples` sequences are measured.
        removal: the criterion by which experts leave.
        work: where each layer's measurements are kept until the result is safe; a run that was
            killed goes on at the next layer.
    """
    check_curves(recipe, source)
    scores = criterion(removal)(statistics, recipe.weights)
    wanted: Sets = {}
    for g in statistics.groups:
        order = block_order(scores.values[g.name].numpy(), g.blocks).tolist()
        wanted[g.name] = [order[:m] for m in depths_to_measure(g)]
    part = share(text, recipe.curve_samples)
    key = _digest(recipe, source, part, wanted)
    homes = {
        g.name: work / f"layer-{g.layer:05d}.json" if work else None for g in statistics.groups
    }
    found = {name: _finished(home, key) for name, home in homes.items()}
    changes = {name: values for name, values in found.items() if values is not None}
    missing = {name: sets for name, sets in wanted.items() if name not in changes}
    about = f"cost curves of {removal} on {len(part.sequences)} sequences, {part.tokens:,} tokens"
    say(f"measuring {about}" + (f"; {len(changes)} layers were done before" if changes else ""))
    if missing:
        layers = source.config.get_text_config().num_hidden_layers
        with Progress("measuring costs", part.tokens * layers) as progress:
            losses = RemovalLosses(
                source.load(recipe.dtype, recipe.device),
                part.batches(recipe.batch_size),
                progress.visit,
            )
            for name, values in losses.measure(missing):
                changes[name] = values
                if (home := homes[name]) is not None:
                    _save(home, key, values)
    return attach(
        statistics, changes, removal, recipe.weights,
        sequences=len(part.sequences), tokens=part.tokens,
    )  # fmt: skip


def share(text: CalibrationSet, count: int) -> CalibrationSet:
    """Evenly spaced sequences of the set, every domain in its proportion."""
    total = len(text.sequences)
    if count >= total:
        return text
    by_domain = sorted(range(total), key=lambda i: text.sequences[i][1])
    chosen = sorted(by_domain[(2 * i + 1) * total // (2 * count)] for i in range(count))
    return replace(text, sequences=tuple(text.sequences[i] for i in chosen))


def _digest(recipe: Recipe, source: Checkpoint, part: CalibrationSet, wanted: Sets) -> str:
    """What the measurements depend on."""
    key = {
        "model": source.fingerprint, "text": part.digest, "sets": wanted,
        "batch": recipe.batch_size, "dtype": recipe.dtype, "device": recipe.device,
    }  # fmt: skip
    return hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()


def _finished(home: Path | None, key: str) -> Tensor | None:
    """A layer's measurements from an earlier run with the same settings."""
    if home is None or not home.is_file():
        return None
    try:
        found = json.loads(home.read_text())
        return torch.tensor(found["changes"], dtype=torch.float64) if found["key"] == key else None
    except (ValueError, KeyError, TypeError):  # damaged: measured again
        return None


def _save(home: Path, key: str, values: Tensor) -> None:
    home.parent.mkdir(parents=True, exist_ok=True)
    partial = home.with_name(home.name + ".partial")
    partial.write_text(json.dumps({"key": key, "changes": values.tolist()}))
    partial.replace(home)
