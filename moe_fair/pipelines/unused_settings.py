"""The settings that a run has no use for, and why, in one table.

Where they were given they are refused, never passed over; and the recipe that is written beside a
result leaves them out. A recipe may hold the settings of every stage: those of an earlier one that
agree with what it has recorded were honoured there.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any

from moe_fair.core.recipe import PLANNING, TARGETS, Recipe
from moe_fair.core.settings import flag

COLLECTED = ("taylor", "counterfactual", "u_score", "gram")
# of a plan's settings those that a plan which is given is held against
CHECKED = ("reduce", "serve")
# a flag of these that is off asks for nothing
EXTRAS = ("u_score", "gram", "alone", "checkpointing")


@dataclass(frozen=True)
class Run:
    """What a run does, as far as it decides which settings matter.

    Attributes:
        plans: a plan is made; not so where one was given.
        collects: statistics are gathered.
        tries: plans are tried against those of rivals.
        measures: removals are measured on a share of the text, alone or as cost curves.
        repairs: the remaining experts are fitted.
        heals: what is cut is trained end to end.
        heldout: held-out losses are measured.
        backward: statistics are gathered with a backward.
    """

    plans: bool = True
    collects: bool = False
    tries: bool = False
    measures: bool = False
    repairs: bool = False
    heals: bool = False
    heldout: bool = False
    backward: bool = True

    @property
    def reads_text(self) -> bool:
        """Calibration text is run through the model."""
        return self.collects or self.tries or self.measures or self.repairs or self.heals


def unused(recipe: Recipe, run: Run) -> dict[str, str]:
    """Setting -> why this run has no use for it. All are settings of `prune`."""
    rows: list[tuple[bool, str, tuple[str, ...]]] = [
        (not run.plans, "the --plan is there", ("rivals", "alone")),
        (not run.collects, "the statistics are there", COLLECTED),
        (not run.collects and not run.measures, "nothing is measured", ("save_every",)),
        (not run.collects, "what is held back was decided when it was calibrated",
         ("trial_samples",)),
        (not run.tries, "no plan is tried against another", ("trial_samples",)),
        (not run.measures, "no removals are measured", ("curve_samples",)),
        (not run.reads_text, "no calibration text is run through the model",
         ("calibration", "samples", "seed", "calibration_digest", "self_share", "server")),
        (not run.heldout, "there is no --heldout text", ("heldout_samples", "heldout_digest")),
        (not run.reads_text and not run.heldout, "no text is run through the model",
         ("length", "map", "batch_size", "dtype", "device", "engine", "max_memory")),
        (not (run.collects or run.heldout or run.heals), "nothing is calibrated or healed, and no "
         "held-out loss measured", ("device_map",)),
        (recipe.engine != "auto", "--engine is given, and needs no deciding", ("max_memory",)),
        (not run.collects or not run.backward, "there is no backward", ("checkpointing",)),
        (recipe.engine == "streaming", "streaming runs every layer again anyway",
         ("checkpointing",)),
        (True, "cost curves of another order are measured by `moe-fair calibrate`", ("curves",)),
        (True, "prune collects what its method needs, and `moe-fair calibrate` what others do",
         ("for_",)),
    ]  # fmt: skip
    found: dict[str, str] = {}
    for applies, why, names in rows:
        if applies:
            found |= {n: why for n in names if n not in found}
    return found


def check_used(
    recipe: Recipe, run: Run, before: Mapping[str, Any], also: Collection[str] = ()
) -> dict[str, str]:
    """Every setting that was given changes something, or has done so in an earlier stage.

    Args:
        before: settings of the earlier stages, whose statistics or plan this run starts from.
        also: of the settings of `unused` those that the command takes; by default all.

    Returns:
        what `unused` gives.

    Raises:
        ValueError: one does not; says which and why.
    """
    plain = {**recipe.to_dict(), **recipe.planning()}
    idle = unused(recipe, run)
    found = dict(idle)
    if not run.plans:
        found |= {n: "the --plan has its own" for n in PLANNING if n not in CHECKED}
    for name, why in found.items():
        nothing = (name in EXTRAS and not plain.get(name)) or plain.get(name) == ["none"]
        done = name in before and before[name] == plain.get(name)
        if name in recipe.given and not nothing and not done and (not also or name in also):
            raise ValueError(f"{flag(name)} would change nothing: {why}; leave it out")
    return idle


def check_untargeted(settings: Mapping[str, Any]) -> None:
    """Whoever gives a plan asks for no target beside it, not even for the plan's own.

    Args:
        settings: what was asked for by name; a recipe file may repeat the target that was met.

    Raises:
        ValueError: a target is among them.
    """
    if any(settings.get(t) is not None for t in TARGETS):
        raise ValueError("a --plan has met its own target; leave the target out, or give --stats")


# of `eval`: what only one of its two measurements uses
OF_EVAL = {
    "--tasks": ("num_fewshot", "limit", "apply_chat_template", "include_path", "log_samples"),
    "--agreement": ("heldout", "heldout_samples", "length", "map", "engine", "max_memory"),
}


def check_used_by_eval(options: Mapping[str, Any], asked: Mapping[str, bool]) -> None:
    """Every option of `eval` that was given is used by what was asked for.

    Args:
        options: their values; unset ones are None or False.
        asked: `--tasks` and `--agreement` -> whether they were.

    Raises:
        ValueError: one is not.
    """
    for what, names in OF_EVAL.items():
        for name in names:
            if not asked[what] and options.get(name) not in (None, False):
                raise ValueError(f"{flag(name)} is for {what}: add {what}, or leave it out")
