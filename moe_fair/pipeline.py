"""The whole flow: calibration text -> statistics -> scores -> budget -> plan -> checkpoint."""

from __future__ import annotations

import json
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from moe_fair.checks import (
    check_device_map,
    check_disk,
    check_hash_layers,
    check_plan_settings,
    check_same_model,
    check_target,
    method,
    target,
    with_needs,
)
from moe_fair.collecting import Say, collect, discard, measure
from moe_fair.core.allocate import allocator, needs
from moe_fair.core.cost_curves import curves, holds_curves
from moe_fair.core.manifest import write_manifest
from moe_fair.core.oracle import Agreement, Oracle
from moe_fair.core.output import check_output, fresh, partial_path, settle
from moe_fair.core.plan import ModelSize, Plan, make_plan
from moe_fair.core.units import Statistics
from moe_fair.costing import (
    ALONE_COSTS,
    CURVE_COSTS,
    check_costs,
    holds_alone,
    measure_alone,
    measure_curves,
)
from moe_fair.distributed import ALONE, Team, is_first, team
from moe_fair.evaluate import HeldoutLoss
from moe_fair.moe.calibration import (
    CalibrationSet,
    expand,
    parse_source,
    sample,
    split,
    windows,
)
from moe_fair.moe.checkpoint import check_writable, count_path, write_model
from moe_fair.moe.choose import PACKED
from moe_fair.moe.load import Checkpoint, pick_device, pick_dtype
from moe_fair.moe.merge import check_mergeable, merging, write_merged
from moe_fair.moe.overlay import UnknownLayoutError
from moe_fair.moe.repair import LayerRepair
from moe_fair.moe.side_files import in_a_line
from moe_fair.moe.table_surgery import check_tables
from moe_fair.oracle import agreements, measure_oracle, save_oracle
from moe_fair.recipe import Recipe
from moe_fair.repairing import repair_kind, repair_model
from moe_fair.report.sources import FOLDER
from moe_fair.trials import best_plan, check_rivals, parted, rivals
from moe_fair.verifying import verify


@dataclass(frozen=True)
class Pruned:
    """What `prune` leaves behind: the checkpoint's directory, the plan, and held-out losses."""

    output: Path
    plan: Plan
    before: HeldoutLoss | None = None
    after: HeldoutLoss | None = None


def calibrate(
    recipe: Recipe, output: Path | None = None, say: Say = lambda _: None
) -> Statistics | None:
    """Statistics of every routed expert; saved to `output` where one is given.

    Where several processes do it together, the first has the statistics and the others None.
    """
    us = team()
    if output is not None and us.first:
        check_output(output)
    source = open_model(recipe)
    check_rivals(recipe, source)
    every = with_needs(recipe, *rivals(recipe).values())
    if recipe.curves is not None:
        check_costs(recipe, source, CURVE_COSTS)
    if every.alone:
        check_costs(recipe, source, ALONE_COSTS)
    text, _ = us.told(lambda: parted(recipe, calibration_set(recipe, source, say), say))
    work = work_folder(output, recipe) if output is not None else None
    statistics = collect(every, source, text, say, work, us)
    if every.alone and statistics is not None:
        home = work / "alone" if work else None
        statistics = measure_alone(recipe, source, text, statistics, home, say)
    if recipe.curves is not None and statistics is not None:
        home = work / "curves" if work else None
        statistics = measure_curves(recipe, source, text, statistics, recipe.curves, home, say)
    if output is not None and work is not None and statistics is not None:
        folder = fresh(partial_path(output))
        statistics.save(folder)
        (folder / "recipe.yaml").write_text(recipe.to_yaml())
        settle(folder, output)
        discard(work)
    return statistics


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
    if team().size > 1:
        raise ValueError("an oracle is measured by one process; start it without a launcher")
    check_output(output)
    source = open_model(recipe)
    if statistics is not None:
        check_same_model(statistics.fingerprint, source, "statistics were")
    text = calibration_set(recipe, source, say)
    work = work_folder(output, recipe)
    if statistics is None:
        statistics = collect(recipe, source, text, say, work)
        assert statistics is not None  # there is no other process
    found = measure_oracle(recipe, source, text, work / "oracle", say)
    table = agreements(found, statistics)
    folder = fresh(partial_path(output))
    save_oracle(folder, found, table)
    (folder / "recipe.yaml").write_text(recipe.to_yaml())
    settle(folder, output)
    discard(work)
    return found, table


def plan(statistics: Statistics, recipe: Recipe) -> Plan:
    """Scores, budget and kept ids from saved statistics; takes milliseconds."""
    removal, protection, rule = method(recipe)
    check_target(recipe, statistics.groups)
    if recipe.hash_layers is not None:
        check_hash_layers(statistics.fingerprint, recipe.hash_layers, "statistics were")
    costs = rows = grams = None
    scores = removal(statistics, recipe.weights)
    if needs(allocator(rule), "costs"):
        costs = curves(statistics, removal.name, recipe.weights)
    if needs(allocator(rule), "rows"):
        rows = {g.name: statistics.view(g, recipe.weights).scaled_rows() for g in statistics.groups}
    if needs(allocator(rule), "gram"):
        views = {g.name: statistics.view(g, recipe.weights) for g in statistics.groups}
        grams = {name: view["gated_gram"].numpy() for name, view in views.items()}
    made = make_plan(
        statistics.groups,
        scores,
        protection(statistics, recipe.weights) if protection else None,
        target=target(recipe),
        allocator=rule,
        before=ModelSize(**statistics.facts["size"]),
        min_units=recipe.min_experts,
        multiple_of=recipe.multiple_of,
        costs=costs,
        rows=rows,
        grams=grams,
        fingerprint=statistics.fingerprint,
        recipe={**statistics.facts["calibration"], **recipe.planning()},
    )
    return merging(made, statistics, recipe.weights) if recipe.reduce == "merge" else made


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
    us = team()
    if us.first:
        check_output(output)
    source = open_model(recipe)
    heldout = us.told(lambda: heldout_set(recipe, source))
    run = _Pruning(recipe, source, output, say, us)
    merges = _merges(recipe, ready)
    if merges:
        check_mergeable(source)
    kind = None if merges else repair_kind(recipe, source, say)
    check_writable(source, unequal=method(recipe)[2] != "uniform" or ready is not None)
    if ready is None:
        statistics = run.measured(statistics)
    made = us.told(lambda: run.decided(statistics, ready))
    if us.first:
        run.write(made, statistics, kind)
    before, after = run.losses(heldout)
    if us.first:
        run.finish(before, after)
    return Pruned(output, made, before, us.told(lambda: after))


class _Pruning:
    """The steps of one `prune`; those that write are the first process's."""

    def __init__(
        self, recipe: Recipe, source: Checkpoint, output: Path, say: Say, us: Team
    ) -> None:
        self.recipe, self.source, self.output = recipe, source, output
        self.say, self.us = say, us
        self.work = work_folder(output, recipe)
        self.folder = partial_path(output)
        self._text: CalibrationSet | None = None
        self._trial: CalibrationSet | None = None

    def measured(self, statistics: Statistics | None) -> Statistics | None:
        """Statistics with all that the plan needs; what can be checked before is checked before."""
        recipe, source = self.recipe, self.source
        size = check_plan_settings(recipe, source).after.bytes
        if self.us.first:
            check_disk(size, self.output)
        self.say(f"disk: about {size / 1e9:.2f} GB for the result")
        check_rivals(recipe, source)
        every = with_needs(recipe, *rivals(recipe).values())
        alone = every.alone and (statistics is None or not holds_alone(statistics))
        costly = _unmeasured(recipe, statistics)
        if costly is not None:
            check_costs(recipe, source, CURVE_COSTS)
        if alone:
            check_costs(recipe, source, ALONE_COSTS)
        if statistics is None:
            self._text = self.us.told(lambda: calibration_set(recipe, source, self.say))
            text, self._trial = parted(recipe, self._text, self.say)
            statistics = collect(every, source, text, self.say, self.work, self.us)
        if self.us.first and statistics is not None:
            check_same_model(statistics.fingerprint, source, "statistics were")
            if alone or costly is not None:
                text = self._same_text(statistics.facts["calibration"])
            if alone:
                home = self.work / "alone"
                statistics = measure_alone(recipe, source, text, statistics, home, self.say)
            if costly is not None:
                home = self.work / "curves"
                statistics = measure_curves(
                    recipe, source, text, statistics, costly, home, self.say
                )
        return statistics

    def decided(self, statistics: Statistics | None, ready: Plan | None) -> Plan:
        """The plan that was given, or the best of those made; checked against model and disk."""
        if ready is None:
            assert statistics is not None
            ready = self._best(statistics)
        check_same_model(ready.fingerprint, self.source, "plan was")
        check_disk(ready.after.bytes, self.output)
        return ready

    def _best(self, statistics: Statistics) -> Plan:
        """The method's own plan, or a rival's that loses less on held-back text."""
        recipe = self.recipe
        if not rivals(recipe):
            return plan(statistics, recipe)
        held = statistics.facts["calibration"].get("held_back", 0)
        if self._trial is None and held:
            seen, trial = split(self._same_text(statistics.facts["calibration"]), held)
            if seen.digest == statistics.fingerprint["calibration"]:
                self._trial = trial
        if self._trial is None:
            if self._text is None or held:
                self.say(
                    "note: no plan is tried against another's: no text is known that the "
                    "statistics have not seen"
                )
            return plan(statistics, recipe)
        home = self.work / "trials.json"
        return best_plan(plan, recipe, self.source, statistics, self._trial, home, self.say)

    def write(self, made: Plan, statistics: Statistics | None, kind: str | None) -> None:
        """The repaired or merged checkpoint, and what explains it, under the temporary name."""
        repairs: list[LayerRepair] = []
        changed = None
        if kind is not None:
            text = self._same_text(
                made.recipe if statistics is None else statistics.facts["calibration"]
            )
            home = self.work / "repair"
            repairs = repair_model(self.recipe, self.source, text, made.kept, kind, home, self.say)
            changed = home if repairs else None
        notes = fresh(self.folder) / FOLDER
        if statistics is not None:
            statistics.save(notes)
        self.say(f"cutting {made.before.parameters:,} parameters to {made.after.parameters:,}")
        started = time.perf_counter()
        if made.merges:
            changed = fresh(self.work / "merged")
            write_merged(self.source, made, changed)
        try:
            beside = write_model(self.source, made.kept, self.folder, repaired=changed)
        except UnknownLayoutError as e:  # what headers could not tell before
            if made.merges:
                raise
            self.say(f"note: not repaired: {e}")
            repairs = []
            beside = write_model(self.source, made.kept, self.folder)
        self.say(f"written in {time.perf_counter() - started:.1f} s")
        if (left := in_a_line(beside)) is not None:
            self.say(left)
        made.save(notes / "plan.json")
        (notes / "recipe.yaml").write_text(self.recipe.to_yaml())
        if repairs:
            table = json.dumps([asdict(r) for r in repairs], indent=1)
            (notes / "repair.json").write_text(table + "\n")

    def losses(
        self, heldout: CalibrationSet | None
    ) -> tuple[HeldoutLoss | None, HeldoutLoss | None]:
        """Held-out loss of the original and of what was written."""
        if heldout is None:
            return None, None
        recipe, us = self.recipe, self.us
        before = measure(recipe, self.source, heldout, "held-out loss, original", us, self.say)
        after = None
        # a disk that not all machines share: who wrote the result measures it
        together = all(us.gather((self.folder / "config.json").is_file()))
        if us.first or together:
            them = us if together else ALONE
            pruned = Checkpoint(str(self.folder), trust_remote_code=self.recipe.trust_remote_code)
            after = measure(recipe, pruned, heldout, "held-out loss, pruned", them, self.say)
        return before, after

    def finish(self, before: HeldoutLoss | None, after: HeldoutLoss | None) -> None:
        """Report, manifest and verification; then the result gets its name."""
        if before is not None and after is not None:
            losses = {"original": asdict(before), "pruned": asdict(after)}
            file = self.folder / FOLDER / "heldout.json"
            file.write_text(json.dumps(losses, indent=1) + "\n")
        from moe_fair.report.write import write_report  # matplotlib takes a second to import

        write_report(self.folder)
        write_manifest(self.folder)
        found = verify(
            self.folder,
            self.source,
            hashes=False,
            trust_remote_code=self.recipe.trust_remote_code,
        )
        if not found.ok:
            raise RuntimeError(
                f"the result does not verify and stays in {self.folder}: {found.wrong}"
            )
        self.say(f"verified: {found.checks[-1].detail}")
        settle(self.folder, self.output)
        discard(self.work)

    def _same_text(self, about: Mapping[str, Any]) -> CalibrationSet:
        """The text that statistics or a plan were made from, where the recipe names none itself."""
        if self._text is None:
            recipe = self.recipe
            if recipe.calibration == Recipe().calibration:
                names = ("calibration", "samples", "length", "seed")
                recipe = recipe.with_settings({n: about[n] for n in names if n in about})
            self._text = calibration_set(recipe, self.source, self.say)
        return self._text


def _merges(recipe: Recipe, ready: Plan | None) -> bool:
    """Experts are merged; with a plan it is the plan that says so.

    Raises:
        ValueError: recipe and plan contradict one another, or merged experts shall be repaired.
    """
    merges = recipe.reduce == "merge" if ready is None else ready.merges
    if recipe.reduce == "merge" and not merges:
        raise ValueError(
            "--reduce merge: the --plan removes experts and has no clusters; make it with "
            "`moe-fair plan STATISTICS --reduce merge`, or leave --reduce out"
        )
    if merges and recipe.repair not in (None, "none"):
        raise ValueError(
            f"--repair {recipe.repair}: merged experts are not repaired; leave --repair out, or "
            "use --reduce prune"
        )
    return merges


def _unmeasured(recipe: Recipe, statistics: Statistics | None) -> str | None:
    """The removal score whose cost curves the allocator needs and the statistics do not hold."""
    removal, _, rule = method(recipe)
    if not needs(allocator(rule), "costs"):
        return None
    held = statistics is not None and holds_curves(statistics, removal.name, recipe.weights)
    return None if held else removal.name


def work_folder(output: Path, recipe: Recipe) -> Path:
    """Where chunks of statistics wait for the result; emptied first with --fresh."""
    folder = output.with_name(output.name + ".calibrating")
    if recipe.fresh and is_first():
        discard(folder)
    return folder


def open_model(recipe: Recipe) -> Checkpoint:
    """The model's files, checked as far as they can be without loading weights."""
    if recipe.model is None:
        raise ValueError("no model given: name a local directory or a Hub id")
    pick_dtype(recipe.dtype, pick_device(recipe.device))
    source = Checkpoint(
        recipe.model,
        recipe.revision,
        recipe.trust_remote_code,
        recipe.allow_pickle,
        recipe.hash_layers or "keep",
    )
    if source.unpacking and recipe.engine == "streaming":
        raise ValueError(f"{recipe.model}: {PACKED}")
    check_device_map(recipe, source)
    assert source.blocks  # known from the config alone: before weights are downloaded
    assert source.groups  # finds the experts in the files as well, or says what was looked for
    check_tables(source)
    count_path(source.config)
    limit = getattr(source.config.get_text_config(), "max_position_embeddings", None)
    if limit and recipe.length > limit:
        raise ValueError(f"--length {recipe.length} is more than the model's {limit} positions")
    return source


def calibration_set(recipe: Recipe, source: Checkpoint, say: Say) -> CalibrationSet:
    """The calibration sequences of a recipe."""
    text = sample(
        [parse_source(s) for s in recipe.calibration],
        source.tokenizer(),
        samples=recipe.samples,
        length=recipe.length,
        seed=recipe.seed,
    )
    for note in text.notes:
        say(f"note: {note}")
    return text


def heldout_set(recipe: Recipe, source: Checkpoint) -> CalibrationSet | None:
    """The held-out windows of a recipe, if it names any text."""
    if not recipe.heldout:
        return None
    sources = expand([parse_source(s) for s in recipe.heldout])
    return windows(
        sources, source.tokenizer(), samples=recipe.heldout_samples, length=recipe.length
    )
