"""Every check that a run of `prune` makes, made before any weights are loaded.

What is found on the way (the opened model, the texts, the repair) is what the run then works with,
so that nothing is looked at twice. A dry run stops here.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from moe_fair.core.allocate import allocator, needs
from moe_fair.core.cost_curves import holds_curves
from moe_fair.core.domain_weights import domain_weights
from moe_fair.core.output import Place
from moe_fair.core.plan import ModelSize, Plan
from moe_fair.core.plan_checks import check_fits
from moe_fair.core.recipe import PLANNING, Recipe
from moe_fair.core.say import Say
from moe_fair.core.sizes import parse_size
from moe_fair.core.units import RESULT_FILE, Statistics
from moe_fair.engines.processes import Team
from moe_fair.moe import ream
from moe_fair.moe.calibration_text import CalibrationSet
from moe_fair.moe.checkpoint_source import Checkpoint
from moe_fair.moe.checkpoint_writer import check_writable
from moe_fair.moe.conversion import Conversion
from moe_fair.moe.device_map import check_resident
from moe_fair.moe.healed_weights import check_healable
from moe_fair.moe.healing_text import healing_text
from moe_fair.moe.merge import check_mergeable
from moe_fair.moe.statistics import Collected
from moe_fair.moe.surgery import check_all
from moe_fair.pipelines.calibrate import work_folder
from moe_fair.pipelines.checks import (
    check_plan_settings,
    check_same_model,
    method,
)
from moe_fair.pipelines.collection import check_held, check_needs, for_prune
from moe_fair.pipelines.disk import check_room, disk_needs
from moe_fair.pipelines.mtp_heads import check_heads, choose_heads, head_facts, size_without
from moe_fair.pipelines.opening import heldout_set, open_model, own_beside
from moe_fair.pipelines.own_source import calibration_text, text_to_come, wanted_text, with_own_text
from moe_fair.pipelines.own_text import OwnText
from moe_fair.pipelines.plan import plan
from moe_fair.pipelines.plan_selection import check_rivals
from moe_fair.pipelines.removal_costs import (
    ALONE_COSTS,
    CURVE_COSTS,
    MEASURED,
    check_costs,
    holds_alone,
)
from moe_fair.pipelines.repair import repair_kind
from moe_fair.pipelines.rivals import rivals
from moe_fair.pipelines.serving import check_served
from moe_fair.pipelines.text_checks import (
    Earlier,
    check_digest,
    check_domains,
    divided,
    with_text_of,
)
from moe_fair.pipelines.trial_text import teaching_text
from moe_fair.pipelines.unused_settings import Run, check_used, unused

PLAN_FILE = "plan.json"
NOT_TRIED = (
    "note: no plan is tried against another's: no text is known that the statistics have not seen"
)


@dataclass(frozen=True)
class Job:
    """A run of `prune` whose checks have passed.

    Attributes:
        recipe: with the text settings of the statistics or the plan where none were given.
        source: the model.
        statistics, plan: those that were given.
        run: what it will do.
        text: all of the calibration text; None where none is needed.
        seen, trial: of it, what statistics are gathered on, and what plans are tried on.
        heldout: the held-out windows.
        repair: its name, or None.
        alone: experts' removals alone are measured; costly: the score whose cost curves are.
        after: size of the result; of one by tolerance, which is not known yet, an estimate.
        own: files of the model's own text, to be kept beside the result.
        sampled: of a dry run, the own text that a run would sample.
        conversion: what the result's weights will be, where that is not what they are.
    """

    recipe: Recipe
    source: Checkpoint
    statistics: Statistics | None
    plan: Plan | None
    run: Run
    text: CalibrationSet | None
    seen: CalibrationSet | None
    trial: CalibrationSet | None
    heldout: CalibrationSet | None
    repair: str | None
    alone: bool
    costly: str | None
    after: ModelSize
    own: dict[str, bytes] = field(default_factory=dict)
    sampled: OwnText | None = None
    conversion: Conversion | None = None

    def stored(self, cut: ModelSize) -> ModelSize:
        """About the size of a result, given that of one that is stored as the model is."""
        return cut if self.conversion is None else self.conversion.size(cut)

    @property
    def collected(self) -> Collected:
        """What is gathered, where statistics are."""
        return for_prune(self.recipe, rivals(self.recipe).values())

    @property
    def teaching(self) -> CalibrationSet | None:
        """What plans are repaired on before they are tried; None where they are not."""
        return teaching_text(self.text, self.trial, self.repair) if self.text is not None else None

    def recorded(self, repaired: bool) -> str:
        """The recipe that does the same again, as YAML.

        Args:
            repaired: some layer was.
        """
        changes: dict[str, Any] = {"repair": self.repair if repaired else "none"}
        run = self.run
        if self.plan is not None:
            changes |= {k: self.plan.recipe[k] for k in PLANNING if k in self.plan.recipe}
            changes["plan"] = PLAN_FILE
        elif self.statistics is not None:
            changes["stats"] = RESULT_FILE
            run = replace(run, measures=False)  # they hold what was measured
        if self.text is not None:
            changes["calibration_digest"] = self.text.digest
        if self.heldout is not None:
            changes["heldout_digest"] = self.heldout.digest
        recipe = self.recipe.with_settings(changes)
        return recipe.to_yaml(without={*unused(recipe, run), "fresh"})


def check_prune(
    recipe: Recipe,
    output: Path,
    place: Place,
    statistics: Statistics | None,
    ready: Plan | None,
    say: Say,
    team: Team,
    *,
    dry: bool = False,
) -> Job:
    """Everything that can be checked before weights are loaded.

    Args:
        place: where the output stands, new or empty.
        statistics, ready: made before; by default those that the recipe names.
        dry: nothing is sampled or written; own text is stood for by as many tokens.

    Raises:
        ValueError: the first thing that is wrong; says what to do.
    """
    if statistics is None and recipe.stats is not None:
        statistics = Statistics.load(Path(recipe.stats))
    if ready is None and recipe.plan is not None:
        ready = Plan.load(Path(recipe.plan))
    earlier = _earlier(statistics, ready)
    given, recipe = recipe, with_text_of(recipe, earlier)
    source = open_model(recipe)
    conversion = _conversion(recipe, source)
    merges = merges_experts(recipe, ready)
    if merges:
        aligned = (recipe.reduce == ream.name) if ready is None else ready.aligned
        check_mergeable(source, aligned=aligned)
    kind = repair_kind(recipe, source, say, merges=merges)
    if recipe.heal:
        check_healable(source)
        check_resident(recipe.device_map)
    uniform = method(recipe)[2] == "uniform" if ready is None else ready.uniform
    check_writable(source, unequal=not uniform)
    alone, costly = False, None
    if ready is not None:
        _check_plan(recipe, ready, source)
        run = Run(plans=False)
    else:
        if statistics is not None:
            check_same_model(statistics.fingerprint, source, "statistics were")
            domain_weights(statistics.domains, recipe.weights)
            # of before they said anything of heads, or of the type
            facts = {"mtp": head_facts(source), "model_type": source.config.model_type}
            facts |= statistics.metadata
            statistics = replace(statistics, metadata=facts)
            measured = any(g.follows for g in statistics.groups)
            choose_heads(recipe, facts["mtp"], method(recipe)[2], measured=measured)
        alone, costly = _measured(recipe, source, statistics)
        run = Run(
            collects=statistics is None,
            tries=bool(rivals(recipe)) and (statistics is None or bool(earlier.held_back)),
            measures=alone or costly is not None,
            backward=for_prune(recipe, rivals(recipe).values()).backward,
        )
        if statistics is None:
            check_needs(recipe)
        else:
            _check_held(statistics, recipe)
    run = replace(
        run, repairs=kind is not None, heals=recipe.heal > 0, heldout=bool(recipe.heldout)
    )
    check_used(given, run, earlier.settings)
    after = ready.after if ready is not None else check_plan_settings(recipe, source).after
    after = after if conversion is None else conversion.size(after)
    if run.reads_text:
        recipe = with_own_text(recipe, source, say, team, earlier=earlier.settings)
    samples, work = recipe.samples + own_beside(recipe), place.beside("calibrating")
    tokens = samples * recipe.length
    needs = disk_needs(recipe, source, after, rewrites=(kind is not None) + merges, tokens=tokens)
    say(team.broadcast(lambda: check_room(needs, output, place, work)))
    if statistics is not None and not run.measures:
        plan(statistics, recipe)  # it can be made
    heldout = team.broadcast(lambda: heldout_set(recipe, source, say))
    if heldout is not None:
        check_digest("heldout", heldout, recipe)
    text, sampled = None, None
    own: dict[str, bytes] = {}
    if run.reads_text:
        if dry:
            text, sampled = text_to_come(recipe, source, say, team)
        else:
            if (recipe.heal or recipe.weights) and wanted_text(recipe, source) is not None:
                # what they refuse is refused before own text is sampled
                to_come = text_to_come(recipe, source, lambda _: None, team)[0]
                _check_text(recipe, to_come, statistics, run)
            text, own = calibration_text(recipe, source, work_folder(place, recipe), say, team)
    if sampled is not None:  # its digest is not known yet
        recipe = replace(recipe, calibration_digest=None)
    seen = trial = None
    if text is not None:
        seen, trial = divided(recipe, text, run, earlier, say)
        _check_text(recipe, text, statistics, run)
    if statistics is not None and rivals(recipe) and trial is None:
        say(NOT_TRIED)
    return Job(
        recipe, source, statistics, ready, run, text, seen, trial, heldout, kind, alone, costly,
        after, own, sampled, conversion,
    )  # fmt: skip


def _check_text(
    recipe: Recipe, text: CalibrationSet, statistics: Statistics | None, run: Run
) -> None:
    """The text has the domains that are asked for, and healing could be judged on it.

    Raises:
        ValueError: it has not, or there is too little of it.
    """
    check_domains(recipe, text, statistics, run)
    if recipe.heal:
        healing_text(text, recipe.heal, recipe.seed)  # it can be made


def _conversion(recipe: Recipe, source: Checkpoint) -> Conversion | None:
    """What --save-as makes of the model's weights.

    Raises:
        ValueError: it cannot, or bytes are limited, which are counted as the weights are now.
    """
    if recipe.save_as is None:
        return None
    if recipe.size is not None and parse_size(recipe.size)[0] == "bytes":
        raise ValueError(
            f"--size {recipe.size} counts bytes of weights as they are, and --save-as "
            f"{recipe.save_as} stores them otherwise; limit parameters, as --size 8B"
        )
    if recipe.heal and recipe.save_as != "bf16":
        raise ValueError(
            f"--heal trains weights as they are written, and --save-as {recipe.save_as} packs "
            "them: leave one of the two out"
        )
    return Conversion(source, recipe.save_as)


def _earlier(statistics: Statistics | None, ready: Plan | None) -> Earlier:
    if statistics is not None and ready is not None:
        raise ValueError("give --plan or --stats, not both: a plan already holds its decision")
    if statistics is not None:
        about = statistics.metadata["calibration"]
        return Earlier("statistics were", about, statistics.fingerprint.get("calibration"))
    if ready is not None:
        return Earlier("plan was", ready.recipe, ready.fingerprint.get("calibration"))
    return Earlier()


def _check_plan(recipe: Recipe, ready: Plan, source: Checkpoint) -> None:
    """The plan is of this model, and fits it.

    Raises:
        ValueError: it is another model's, says something else of MTP heads than the recipe, routing
            cannot work with what it keeps, or its sizes are not those of what it keeps.
    """
    check_same_model(ready.fingerprint, source, "plan was")
    check_heads(recipe, source, ready)
    check_all([*source.blocks, *source.heads.blocks], ready.kept)
    groups = tuple(g for g in source.groups if ready.mtp == "cut" or not g.follows)
    check_served(recipe, ready, source.config.model_type)
    check_fits(ready, groups, source.size, size_without(source.size, ready.mtp, head_facts(source)))


def _measured(
    recipe: Recipe, source: Checkpoint, statistics: Statistics | None
) -> tuple[bool, str | None]:
    """Whether removals alone, and by which score cost curves, are still to be measured.

    Raises:
        ValueError: they cannot be here, or a rival cannot be tried.
    """
    check_rivals(recipe, source)
    collected = for_prune(recipe, rivals(recipe).values())
    alone = "alone" in collected and (statistics is None or not holds_alone(statistics))
    costly = _unmeasured(recipe, statistics)
    if costly is not None:
        check_costs(recipe, source, CURVE_COSTS)
    if alone:
        check_costs(recipe, source, ALONE_COSTS)
    return alone, costly


def _check_held(statistics: Statistics, recipe: Recipe) -> None:
    """What is not measured here is in the statistics, also for rivals that were named.

    Raises:
        ValueError: it is not.
    """
    check_held(statistics, recipe, MEASURED)
    for name, its in rivals(recipe).items() if recipe.rivals is not None else ():
        try:
            check_held(statistics, its, MEASURED)
        except ValueError as e:
            raise ValueError(f"--rivals {name}: {e}") from e


def merges_experts(recipe: Recipe, ready: Plan | None) -> bool:
    """Experts are merged; with a plan it is the plan that says so.

    Raises:
        ValueError: recipe and plan contradict one another.
    """
    how = recipe.reduce
    if ready is None:
        return how != "prune"
    if how != "prune" and not ready.merges:
        raise ValueError(
            f"--reduce {how}: the --plan removes experts and has no clusters; make it with "
            f"`moe-fair plan STATISTICS --reduce {how}`, or leave --reduce out"
        )
    if how != "prune" and ready.aligned != (how == ream.name):
        raise ValueError(
            f"--reduce {how}: the --plan merges experts in another way; make it with "
            f"`moe-fair plan STATISTICS --reduce {how}`, or leave --reduce out"
        )
    return ready.merges


def _unmeasured(recipe: Recipe, statistics: Statistics | None) -> str | None:
    """The removal score whose cost curves the allocator needs and the statistics do not hold."""
    removal, _, rule = method(recipe)
    if not needs(allocator(rule), "costs"):
        return None
    held = statistics is not None and holds_curves(statistics, removal.name, recipe.weights)
    return None if held else removal.name
