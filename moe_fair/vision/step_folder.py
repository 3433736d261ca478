"""What the steps of a pruning run leave for one that goes on: each cut, and each finished step.

step-1/cut/        the model after the cut, its plan, `record.json`, the statistics in `scored`
step-1/            the same at the end of the step, with `step.json` in place of the record
step-1/removing/   of removal while training; step-1/training/: of fine-tuning
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from moe_fair.core.output import fresh, partial_path, write_whole
from moe_fair.core.plan import Plan
from moe_fair.core.units import Statistics
from moe_fair.vision.checkpoint import open_pruned, save_pruned
from moe_fair.vision.load import Source

Record = dict[str, Any]  # accuracies and costs of a step


@dataclass(frozen=True)
class StepFolder:
    """Where one step is kept."""

    path: Path

    @property
    def removing(self) -> Path:
        """Of units that leave while the model trains."""
        return self.path / "removing"

    @property
    def training(self) -> Path:
        """Of fine-tuning."""
        return self.path / "training"

    def plan(self) -> Plan:
        """Of a finished step."""
        return Plan.load(self.path / "plan.json")

    def statistics(self) -> Statistics | None:
        """Of a finished step; None where scores were taken in training."""
        scored = self.path / "scored"
        return Statistics.load(scored) if scored.exists() else None

    def finished(self) -> tuple[Source, Record] | None:
        """The model and the record at its end, if it has come there."""
        return _taken(self.path, "step.json") if (self.path / "step.json").is_file() else None

    def cut(self) -> tuple[Source, Record] | None:
        """The model and the record after the cut, if it has come there."""
        cut = self.path / "cut"
        return _taken(cut, "record.json") if (cut / "plan.json").is_file() else None

    def keep_cut(
        self, source: Source, record: Record, plan: Plan, statistics: Statistics | None
    ) -> None:
        """Keep what the step has after its cut."""
        partial = fresh(partial_path(self.path))
        save_pruned(source.model, source, source.history, partial)
        if statistics is not None:
            statistics.save(partial / "scored")
        plan.save(partial / "plan.json")
        (partial / "record.json").write_text(json.dumps(record))
        self.path.mkdir(parents=True, exist_ok=True)
        partial.rename(self.path / "cut")
        shutil.rmtree(self.removing, ignore_errors=True)

    def keep_finished(self, source: Source, record: Record) -> None:
        """Keep what the step has at its end, in place of all that came before."""
        partial = fresh(partial_path(self.path))
        save_pruned(source.model, source, source.history, partial)
        if (self.path / "cut" / "scored").exists():
            shutil.copytree(self.path / "cut" / "scored", partial / "scored")
        shutil.copy(self.path / "cut" / "plan.json", partial / "plan.json")
        (partial / "step.json").write_text(json.dumps(record))
        shutil.rmtree(self.path)
        partial.rename(self.path)


def _taken(folder: Path, record: str) -> tuple[Source, Record]:
    # the code is what the run itself was started with
    source = open_pruned(folder, trust_remote_code=True)
    return source, json.loads((folder / record).read_text())


def claim_steps(
    work: Path,
    settings: dict[str, Any],
    about: dict[str, str],
    start_over: bool,
    say: Callable[[str], None],
) -> None:
    """Make the folder of a run's steps this run's; emptied where they are another's.

    Args:
        about: what the steps depend on beside the settings, see `identity`.
        start_over: empty it whatever is there.
    """
    key = {"settings": json.loads(json.dumps(settings)), **about}
    record = work / "settings.json"
    found = _read_key(record)
    if work.exists() and (start_over or found != key):
        if not start_over:
            other = [k for k, v in key.items() if k in found and found[k] != v] or ["settings"]
            say(f"{work} holds a run with other {' and '.join(other)}: starting over")
        shutil.rmtree(work)
    write_whole(record, json.dumps(key, sort_keys=True))


def _read_key(record: Path) -> dict[str, Any]:
    """What an earlier run noted down; empty where there was none."""
    try:
        found = json.loads(record.read_text())
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}
