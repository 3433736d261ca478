"""The oracle of a model, measured layer by layer, and how every criterion agrees with it."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from moe_fair.collecting import Say, choose_engine
from moe_fair.core.criterion import Criterion
from moe_fair.core.oracle import Agreement, Oracle, agreement
from moe_fair.core.units import Statistics
from moe_fair.moe.calibration import CalibrationSet
from moe_fair.moe.criteria import criteria
from moe_fair.moe.load import Checkpoint
from moe_fair.moe.removal import RemovalLosses
from moe_fair.progress import Progress
from moe_fair.recipe import Recipe

ORACLE_FILE = "oracle.safetensors"
TABLE_FILE = "agreement.json"


def measure_oracle(
    recipe: Recipe,
    source: Checkpoint,
    text: CalibrationSet,
    work: Path,
    say: Say = lambda _: None,
) -> Oracle:
    """Loss change of every expert removed alone; a killed run goes on at the next layer.

    Args:
        work: where each layer's changes are kept until the result is safe.

    Raises:
        ValueError: the model does not fit in memory.
    """
    chosen = choose_engine(recipe, source)
    if chosen.engine != "resident":
        raise ValueError(
            "an oracle runs layers again and again and needs the whole model in memory "
            f"({chosen.why})"
        )
    fingerprint = {**source.fingerprint, "calibration": text.digest}
    mark = {"fingerprint": json.dumps(fingerprint, sort_keys=True)}
    homes = {b.name: work / f"layer-{b.layer:05d}.safetensors" for b in source.blocks}
    done = {n: t for n, home in homes.items() if (t := _finished(home, mark)) is not None}
    left = {
        b.name: [[e] for e in range(b.num_experts)] for b in source.blocks if b.name not in done
    }
    if done:
        say(f"going on: {len(done)} of {len(homes)} layers were done before")
    work.mkdir(parents=True, exist_ok=True)
    depth = source.config.get_text_config().num_hidden_layers
    model = source.load(recipe.dtype, recipe.device)
    with Progress("removing", text.tokens * depth) as progress:
        losses = RemovalLosses(model, text.batches(recipe.batch_size), progress.visit)
        say(f"oracle: {sum(map(len, left.values()))} removals on {losses.tokens:,} tokens")
        for name, change in losses.measure(left):
            partial = homes[name].with_suffix(".partial")
            save_file({"change": change}, partial, {**mark, "loss": repr(losses.loss)})
            partial.rename(homes[name])
            done[name] = (change, losses.loss)
    return Oracle(
        changes={n: done[n][0] for n in homes},
        loss=done[next(iter(homes))][1],
        tokens=losses.tokens,
        fingerprint=fingerprint,
        facts={
            "model": recipe.model, "samples": len(text.sequences), "length": recipe.length,
            "seed": recipe.seed,
        },
    )  # fmt: skip


def _finished(home: Path, mark: dict[str, str]) -> tuple[Tensor, float] | None:
    """A layer's changes and the whole loss, from an earlier run on the same model and text."""
    if not home.is_file():
        return None
    try:
        with safe_open(home, framework="pt") as f:
            header = f.metadata() or {}
            if header.get("fingerprint") != mark["fingerprint"]:
                return None
            return f.get_tensor("change"), float(header["loss"])
    except (SafetensorError, OSError, ValueError, KeyError):
        return None  # damaged: measured again


def agreements(oracle: Oracle, statistics: Statistics) -> dict[str, Agreement]:
    """Correlations of every criterion that these statistics can feed, best first.

    Raises:
        ValueError: the statistics are of another model.
    """
    for part in ("model", "tokenizer"):
        if oracle.fingerprint.get(part) != statistics.fingerprint.get(part):
            raise ValueError(f"the statistics were made from another {part} than the oracle")
    found = {
        name: agreement(rule(statistics).values, oracle)
        for name, rule in criteria().items()
        if _fed(rule, statistics)
    }
    return dict(sorted(found.items(), key=lambda item: -item[1].pearson))


def _fed(rule: Criterion, statistics: Statistics) -> bool:
    view = statistics.view(statistics.groups[0])
    return all(n in view for n in rule.needs)


def save_oracle(folder: Path, oracle: Oracle, table: dict[str, Agreement]) -> None:
    """The oracle and the table of correlations."""
    oracle.save(folder / ORACLE_FILE)
    plain = {name: asdict(a) for name, a in table.items()}
    (folder / TABLE_FILE).write_text(json.dumps(plain, indent=1) + "\n")
