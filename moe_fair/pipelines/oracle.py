"""The oracle of a model, measured layer by layer, and how every criterion agrees with it."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path

from moe_fair.core.criterion import Criterion
from moe_fair.core.oracle import Agreement, Oracle, agreement
from moe_fair.core.recipe import Recipe
from moe_fair.core.say import Say
from moe_fair.core.units import Statistics
from moe_fair.moe.calibration_text import CalibrationSet
from moe_fair.moe.checkpoint_source import Checkpoint
from moe_fair.moe.criteria import criteria
from moe_fair.pipelines.calibrate import choose_engine
from moe_fair.pipelines.removal_losses import Removals

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
    singles = {b.name: [[e] for e in range(b.num_experts)] for b in source.blocks}
    removals = Removals(recipe, source, text, singles, work)
    if removals.earlier:
        say(f"going on: {removals.earlier} of {len(singles)} layers were done before")
    left = sum(len(s) for n, s in singles.items() if n not in removals.by_batch)
    say(f"oracle: {left} removals on {removals.tokens:,} tokens")
    removals.measure("removing", say)
    return Oracle(
        changes=removals.changes,
        loss=removals.loss,
        tokens=removals.tokens,
        fingerprint={**source.fingerprint, "calibration": text.digest},
        metadata={
            "model": recipe.model, "samples": len(text.sequences), "length": recipe.length,
            "seed": recipe.seed,
        },
    )  # fmt: skip


def agreements(oracle: Oracle, statistics: Statistics) -> dict[str, Agreement]:
    """Correlations of every criterion that these statistics can feed, best first.

    Raises:
        ValueError: the statistics are of another model.
    """
    for part in ("model", "tokenizer"):
        if oracle.fingerprint.get(part) != statistics.fingerprint.get(part):
            raise ValueError(f"the statistics were made from another {part} than the oracle")
    statistics = statistics.without_following()
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
