"""Evaluation results as files beside a pruned checkpoint: what the report and the card show."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from moe_fair.core.output import write_whole
from moe_fair.evaluate.agreement import Agreement, Agreements
from moe_fair.evaluate.compare import Row
from moe_fair.evaluate.drafts import Drafts
from moe_fair.evaluate.heldout import HeldoutLoss

BENCHMARKS, AGREEMENT, HELDOUT = "benchmarks.json", "agreement.json", "heldout.json"
DRAFTS = "drafts.json"


def save_benchmarks(folder: Path, rows: Sequence[Row]) -> list[Row]:
    """Add rows to those of earlier runs; a task and metric measured again replaces the old row.

    Returns:
        all rows.
    """
    kept = {(r.task, r.metric): r for r in load_benchmarks(folder) or ()}
    kept |= {(r.task, r.metric): r for r in rows}
    _write(folder / BENCHMARKS, {"rows": [asdict(r) for r in kept.values()]})
    return list(kept.values())


def load_benchmarks(folder: Path) -> list[Row] | None:
    """The rows, or None where no benchmark was run."""
    raw = _read(folder / BENCHMARKS)
    try:
        return None if raw is None else [Row(**r) for r in raw["rows"]]
    except (KeyError, TypeError) as e:
        raise ValueError(f"{folder / BENCHMARKS} is not a table of ours: {e}; remove it") from e


def save_agreement(folder: Path, found: Agreements) -> None:
    """Write the agreement, in place of an earlier one."""
    _write(folder / AGREEMENT, asdict(found))


def load_agreement(folder: Path) -> Agreements | None:
    """The agreement, or None where it was not measured."""
    raw = _read(folder / AGREEMENT)
    try:
        if raw is None:
            return None
        domains = {d: Agreement(**a) for d, a in raw["domains"].items()}
        return Agreements(Agreement(**raw["mean"]), domains)
    except (KeyError, TypeError) as e:
        raise ValueError(f"{folder / AGREEMENT} is not a table of ours: {e}; remove it") from e


def load_heldout(folder: Path) -> tuple[HeldoutLoss, HeldoutLoss] | None:
    """Held-out losses of original and pruned, or None where `prune` had no --heldout."""
    raw = _read(folder / HELDOUT)
    try:
        if raw is None:
            return None
        return HeldoutLoss(**raw["original"]), HeldoutLoss(**raw["pruned"])
    except (KeyError, TypeError) as e:
        raise ValueError(f"{folder / HELDOUT} is not a table of ours: {e}; remove it") from e


def save_drafts(folder: Path, original: Drafts, pruned: Drafts) -> None:
    """Write what becomes of both models' drafted tokens."""
    _write(folder / DRAFTS, {"original": asdict(original), "pruned": asdict(pruned)})


def load_drafts(folder: Path) -> tuple[Drafts, Drafts] | None:
    """Drafts of original and pruned, or None where they were not measured."""
    raw = _read(folder / DRAFTS)
    try:
        return None if raw is None else (Drafts(**raw["original"]), Drafts(**raw["pruned"]))
    except (KeyError, TypeError) as e:
        raise ValueError(f"{folder / DRAFTS} is not a table of ours: {e}; remove it") from e


def _read(path: Path) -> Any:
    if not path.is_file():
        return None
    try:
        return json.loads(path.read_text())
    except ValueError as e:
        raise ValueError(f"{path} is not JSON: {e}; remove it") from e


def _write(path: Path, content: Any) -> None:
    write_whole(path, json.dumps(content, indent=1) + "\n")
