"""The whole flow: calibration text -> statistics -> scores -> budget -> plan -> checkpoint."""

from __future__ import annotations

import json
import os
import time
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path

import torch

from moe_fair.core.interrupts import closing
from moe_fair.core.oracle import Agreement, Oracle
from moe_fair.core.output import Place, claim, discard, fresh, settle
from moe_fair.core.plan import Plan
from moe_fair.core.recipe import TARGETS, Recipe
from moe_fair.core.say import Say
from moe_fair.core.units import RESULT_FILE, Statistics
from moe_fair.engines.processes import ALONE, Team, current_team
from moe_fair.evaluate import HeldoutLoss
from moe_fair.evaluate.record import save_drafts
from moe_fair.moe.checkpoint_source import Checkpoint
from moe_fair.moe.checkpoint_writer import write_model
from moe_fair.moe.healing_record import Healing
from moe_fair.moe.layer_repair import LayerRepair
from moe_fair.moe.merge import write_merged
from moe_fair.moe.overlay import UnknownLayoutError
from moe_fair.moe.side_files import in_a_line
from moe_fair.pipelines.calibrate import collect, measure, work_folder
from moe_fair.pipelines.checks import check_same_model
from moe_fair.pipelines.collection import asked, for_calibrate
from moe_fair.pipelines.disk import check_room, disk_needs
from moe_fair.pipelines.draft_acceptance import measure_drafts
from moe_fair.pipelines.finish import name_result, verify_result
from moe_fair.pipelines.heal import heal_model
from moe_fair.pipelines.heal import save as save_healing
from moe_fair.pipelines.opening import calibration_set, heldout_set, open_model
from moe_fair.pipelines.oracle import agreements, measure_oracle, save_oracle
from moe_fair.pipelines.own_source import calibration_text, with_own_text
from moe_fair.pipelines.plan import plan
from moe_fair.pipelines.plan_selection import best_plan, check_rivals
from moe_fair.pipelines.preflight import PLAN_FILE, Job, check_prune
from moe_fair.pipelines.removal_costs import (
    ALONE_COSTS,
    CURVE_COSTS,
    check_costs,
    measure_alone,
    measure_curves,
)
from moe_fair.pipelines.repair import repair_model
from moe_fair.pipelines.rivals import rivals
from moe_fair.pipelines.text_checks import check_compared, check_same_text
from moe_fair.pipelines.trial_text import hold_out
from moe_fair.pipelines.unused_settings import Run, check_used
from moe_fair.report.sources import FOLDER, USE
from moe_fair.report.unrouted import unrouted_line

__all__ = [
    "FOLDER", "Pruned", "calibrate", "calibration_set", "heldout_set", "open_model", "oracle",
    "plan", "prune",
]  # fmt: skip
MERGED = "merged"  # where a run keeps what merged experts become
# of the settings that a run may have no use for, those that `calibrate` takes
OF_CALIBRATE = (
    "trial_samples", "curve_samples", "max_memory", "checkpointing", "device_map",
)  # fmt: skip


@dataclass(frozen=True)
class Pruned:
    """What `prune` leaves behind: the checkpoint's directory, the plan, and held-out losses."""

    output: Path
    plan: Plan
    before: HeldoutLoss | None = None
    after: HeldoutLoss | None = None


@torch.inference_mode(False)  # whatever the caller's mode: gradients are needed here
@torch.enable_grad()
def calibrate(
    recipe: Recipe, output: Path | None = None, say: Say = lambda _: None
) -> Statistics | None:
    """Statistics of every routed expert; saved to `output` where one is given.

    Where several processes do it together, the first has the statistics and the others None.
    """
    team = current_team()
    for name in ("stats", "plan"):
        if name in recipe.given:
            raise ValueError(f"calibrate makes statistics anew; take {name} out of the recipe")
    if output is None:
        return _calibrate(recipe, None, say, team)[0]
    with claim(output, first=team.first) as place:
        statistics, recorded, own = _calibrate(recipe, place, say, team)
        if statistics is not None:
            folder = fresh(place.partial)
            statistics.save(folder)
            (folder / "recipe.yaml").write_text(recorded)
            for name, content in own.items():
                (folder / name).write_bytes(content)
            with closing(output):
                settle(folder, place.path)
                discard(place.beside("calibrating"))
    return statistics


def _calibrate(
    recipe: Recipe, place: Place | None, say: Say, team: Team
) -> tuple[Statistics | None, str, dict[str, bytes]]:
    """The same, without writing the result; the recipe that does it again, as YAML; own text."""
    source = open_model(recipe)
    its = asked(recipe, rivals(recipe))
    if recipe.rivals is not None and any(getattr(recipe, t) is not None for t in TARGETS):
        check_rivals(recipe, source)  # from a recipe of `prune`, which has a target
    collected, alone = its.collected, "alone" in its.collected
    run = Run(
        collects=True,
        tries=its.tries,
        measures=alone or recipe.curves is not None,
        backward=collected.backward,
    )
    idle = check_used(recipe, run, {}, OF_CALIBRATE)
    if recipe.curves is not None:
        check_costs(recipe, source, CURVE_COSTS)
    if alone:
        check_costs(recipe, source, ALONE_COSTS)
    recipe = with_own_text(recipe, source, say, team)
    work = work_folder(place, recipe) if place is not None else None
    whole, own = calibration_text(recipe, source, work, say, team)
    check_same_text("calibration", whole, recipe.calibration_digest)
    text = hold_out(whole, recipe.trial_samples, say)[0] if its.tries else whole
    check_compared(text, recipe.weights, its.methods)
    statistics = collect(recipe, source, text, say, work, team, collected=collected)
    if alone and statistics is not None:
        home = work / "alone" if work else None
        statistics = measure_alone(recipe, source, text, statistics, home, say)
    if recipe.curves is not None and statistics is not None:
        home = work / "curves" if work else None
        statistics = measure_curves(recipe, source, text, statistics, recipe.curves, home, say)
    recorded = recipe.with_settings({"calibration_digest": whole.digest})
    left_out = {*idle.keys() & {*OF_CALIBRATE}, "fresh"}
    return statistics, recorded.to_yaml(without=left_out), own


@torch.inference_mode(False)  # whatever the caller's mode: gradients are needed here
@torch.enable_grad()
def oracle(
    recipe: Recipe,
    output: Path,
    *,
    statistics: Statistics | None = None,
    say: Say = lambda _: None,
) -> tuple[Oracle, dict[str, Agreement]]:
    """Measured loss change of every expert removed alone, and every criterion's agreement with it.

    Args:
        output: new directory for the oracle, the table and the recipe.
        statistics: to score with; without them they are collected on the same text.
    """
    if current_team().size > 1:
        raise ValueError("an oracle is measured by one process; start it without a launcher")
    with claim(output) as place:
        source = open_model(recipe)
        if statistics is not None:
            check_same_model(statistics.fingerprint, source, "statistics were")
        team = current_team()
        if "calibration" not in recipe.given:  # what is measured is the text that is given
            recipe = with_own_text(recipe, source, say, team)
        work = work_folder(place, recipe)
        text, own = calibration_text(recipe, source, work, say, team)
        if statistics is None:
            body = recipe.with_settings({"mtp": "drop"})  # no removal of theirs is measured
            statistics = collect(body, source, text, say, work, collected=for_calibrate(body))
            assert statistics is not None  # there is no other process
        found = measure_oracle(recipe, source, text, work / "oracle", say)
        table = agreements(found, statistics)
        folder = fresh(place.partial)
        save_oracle(folder, found, table)
        if recipe.stats is not None:  # paths in a recipe are relative to it
            recipe = recipe.with_settings({"stats": os.path.relpath(recipe.stats, output)})
        (folder / "recipe.yaml").write_text(recipe.to_yaml(without=["fresh"]))
        for name, content in own.items():
            (folder / name).write_bytes(content)
        with closing(output):
            settle(folder, place.path)
            discard(work)
    return found, table


@torch.inference_mode(False)  # whatever the caller's mode: gradients are needed here
@torch.enable_grad()
def prune(
    recipe: Recipe,
    output: Path,
    *,
    statistics: Statistics | None = None,
    ready: Plan | None = None,
    say: Say = lambda _: None,
) -> Pruned:
    """A pruned checkpoint in `output`, from statistics or a plan where one is given.

    Where several processes do it together, they share the measuring; the first plans and writes.
    """
    team = current_team()
    with claim(output, first=team.first) as place:
        return _prune(recipe, output, place, statistics, ready, say, team)


def _prune(
    recipe: Recipe,
    output: Path,
    place: Place,
    statistics: Statistics | None,
    ready: Plan | None,
    say: Say,
    team: Team,
) -> Pruned:
    job = check_prune(recipe, output, place, statistics, ready, say, team)
    run = _Pruning(job, output, place, say, team)
    statistics = run.measure() if job.plan is None else None
    made = team.broadcast(lambda: run.decide(statistics))
    if team.first:
        run.merge(made)
        repairs = run.cut(made, run.repair(made))
    healing = run.heal()
    if team.first:
        run.write(made, statistics, repairs, healing)
    before, after = run.evaluate()
    if team.first:
        run.evaluate_heads(made)
        run.write_report(before, after)
        run.verify()
        run.finish()
    return Pruned(output, made, before, team.broadcast(lambda: after))


class _Pruning:
    """The steps of one `prune`; those that write are the first process's."""

    def __init__(self, job: Job, output: Path, place: Place, say: Say, team: Team) -> None:
        self.job, self.recipe, self.source = job, job.recipe, job.source
        self.output, self.place, self.say, self.team = output, place, say, team
        self.work = place.beside("calibrating")
        self.folder = place.partial

    def measure(self) -> Statistics | None:
        """Statistics with all that the plan needs."""
        job, recipe, source = self.job, self.recipe, self.source
        statistics = job.statistics
        if statistics is None:
            assert job.seen is not None
            statistics = collect(
                recipe, source, job.seen, self.say, self.work, self.team, collected=job.collected
            )
        if self.team.first and statistics is not None and job.run.measures:
            assert job.text is not None
            if job.alone:
                home = self.work / "alone"
                statistics = measure_alone(recipe, source, job.text, statistics, home, self.say)
            if job.costly is not None:
                home = self.work / "curves"
                statistics = measure_curves(
                    recipe, source, job.text, statistics, job.costly, home, self.say
                )
        return statistics

    def decide(self, statistics: Statistics | None) -> Plan:
        """The plan that was given, or the best of those made; checked against the disk."""
        made = self.job.plan
        if made is None:
            assert statistics is not None
            if self.job.trial is None:
                made = plan(statistics, self.recipe)
            else:
                home = self.work / "trials.json"
                made = best_plan(
                    plan, self.recipe, self.source, statistics, self.job.trial, home, self.say,
                    teaching=self.job.teaching,
                )  # fmt: skip
        job = self.job
        needs = disk_needs(
            self.recipe, self.source, job.stored(made.after),
            rewrites=(job.repair is not None) + made.merges,
            tokens=job.text.tokens if job.text is not None else 0,
        )  # fmt: skip
        check_room(needs, self.output, self.place, self.work)
        return made

    def merge(self, made: Plan) -> None:
        """What experts that are merged become; the repair goes on from there."""
        if made.merges:
            write_merged(self.source, made, fresh(self.work / MERGED))

    def repair(self, made: Plan) -> list[LayerRepair]:
        """What the remaining experts become; the cut writes it."""
        if self.job.repair is None:
            return []
        assert self.job.text is not None
        home = self.work / "repair"
        return repair_model(
            self.recipe, self.source, self.job.text, made, self.job.repair, home, self.say,
            self.job.conversion, self.work / MERGED,
        )  # fmt: skip

    def cut(self, made: Plan, repairs: list[LayerRepair]) -> list[LayerRepair]:
        """The repaired or merged checkpoint, under the temporary name; the repairs it holds."""
        merged = self.work / MERGED if made.merges else None
        repaired = self.work / "repair" if repairs else None
        fresh(self.folder)
        self.say(f"cutting {made.before.parameters:,} parameters to {made.after.parameters:,}")
        started = time.perf_counter()
        write = partial(
            write_model, self.source, made.kept, self.folder, drop_heads=made.mtp == "drop",
            conversion=self.job.conversion, merged=merged,
        )  # fmt: skip
        try:
            beside = write(repaired=repaired)
        except UnknownLayoutError as e:  # what headers could not tell before
            if made.merges:
                raise
            self.say(f"note: not repaired: {e}")
            repairs = []
            beside = write()
        self.say(f"written in {time.perf_counter() - started:.1f} s")
        if (left := in_a_line(beside)) is not None:
            self.say(left)
        return repairs

    def heal(self) -> Healing | None:
        """What was cut trained end to end, where that is asked for; every process takes part."""
        if not self.recipe.heal:
            return None
        assert self.job.text is not None
        home = self.work / "heal"
        return heal_model(
            self.recipe, self.source, self.folder, self.job.text, home, self.say, self.team
        )

    def write(
        self,
        made: Plan,
        statistics: Statistics | None,
        repairs: list[LayerRepair],
        healing: Healing | None,
    ) -> None:
        """What explains the checkpoint, beside it."""
        notes = self.folder / FOLDER
        if statistics is not None:
            statistics.save(notes, RESULT_FILE)
            use = {n: s[USE] for n, s in statistics.sums.items() if USE in s}
            if (line := unrouted_line(made.groups, use)) is not None:
                self.say(f"note: {line}")
        made.save(notes / PLAN_FILE)
        for name, content in self.job.own.items():
            (notes / name).write_bytes(content)
        (notes / "recipe.yaml").write_text(self.job.recorded(bool(repairs)))
        if repairs:
            table = json.dumps([asdict(r) for r in repairs], indent=1)
            (notes / "repair.json").write_text(table + "\n")
        if healing is not None:
            save_healing(healing, notes)

    def evaluate(self) -> tuple[HeldoutLoss | None, HeldoutLoss | None]:
        """Held-out loss of the original and of what was written."""
        heldout = self.job.heldout
        if heldout is None:
            return None, None
        recipe, team = self.recipe, self.team
        before = measure(recipe, self.source, heldout, "held-out loss, original", team, self.say)
        after = None
        # a disk that not all machines share: who wrote the result measures it
        together = all(team.gather((self.folder / "config.json").is_file()))
        if team.first or together:
            them = team if together else ALONE
            pruned = Checkpoint(str(self.folder), trust_remote_code=recipe.trust_remote_code)
            after = measure(recipe, pruned, heldout, "held-out loss, pruned", them, self.say)
        return before, after

    def evaluate_heads(self, made: Plan) -> None:
        """What becomes of the tokens that MTP heads draft, where there is text for it."""
        heldout = self.job.heldout
        if heldout is None or made.mtp not in ("cut", "keep") or not self.source.heads.blocks:
            return
        trusted = self.recipe.trust_remote_code
        pruned = Checkpoint(str(self.folder), trust_remote_code=trusted)
        drafts = [
            measure_drafts(self.recipe, model, heldout, f"drafted tokens, {name}", self.say)
            for model, name in ((self.source, "original"), (pruned, "pruned"))
        ]
        save_drafts(self.folder / FOLDER, *drafts)
        rates = " and ".join(f"{d.rate:.1%}" for d in drafts)
        self.say(f"MTP head: original and pruned accept {rates} of the drafted tokens")

    def write_report(self, before: HeldoutLoss | None, after: HeldoutLoss | None) -> None:
        """The losses, and a page of all that is known."""
        if before is not None and after is not None:
            losses = {"original": asdict(before), "pruned": asdict(after)}
            file = self.folder / FOLDER / "heldout.json"
            file.write_text(json.dumps(losses, indent=1) + "\n")
        from moe_fair.report.write import write_report  # matplotlib takes a second to import

        write_report(self.folder)

    def verify(self) -> None:
        """Check the whole result against its plan and the original."""
        trusted = self.recipe.trust_remote_code
        verify_result(self.folder, self.say, self.source, trust_remote_code=trusted)

    def finish(self) -> None:
        """Give the result its name."""
        name_result(self.place, self.output, self.work)
