"""The whole flow: calibration text -> statistics -> scores -> budget -> plan -> checkpoint."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import torch

from moe_fair.core.allocate import allocator
from moe_fair.core.criterion import Criterion
from moe_fair.core.plan import ModelSize, Plan, Target, make_plan
from moe_fair.core.registry import pick
from moe_fair.core.units import Scores, Statistics, UnitGroup
from moe_fair.evaluate import HeldoutLoss, heldout_loss
from moe_fair.moe.blocks import find_blocks
from moe_fair.moe.calibration import CalibrationSet, expand, parse_source, sample, windows
from moe_fair.moe.checkpoint import (
    check_output,
    count_key,
    fresh,
    partial_path,
    settle,
    write_model,
)
from moe_fair.moe.choose import Choice, choose, start, weight_dtype
from moe_fair.moe.collect import ExpertCollector
from moe_fair.moe.criteria import criteria, criterion
from moe_fair.moe.load import Checkpoint, pick_device, pick_dtype
from moe_fair.progress import Progress
from moe_fair.recipe import Recipe, parse_bytes, parse_size

FOLDER = "moe_fair"  # inside a pruned checkpoint: plan, statistics, recipe, held-out losses
Say = Callable[[str], None]


@dataclass(frozen=True)
class Pruned:
    """What `prune` leaves behind: the checkpoint's directory, the plan, and held-out losses."""

    output: Path
    plan: Plan
    before: HeldoutLoss | None = None
    after: HeldoutLoss | None = None


def calibrate(recipe: Recipe, output: Path | None = None, say: Say = lambda _: None) -> Statistics:
    """Statistics of every routed expert; saved to `output` where one is given."""
    if output is not None:
        check_output(output)
    source = open_model(recipe)
    statistics = collect(recipe, source, calibration_set(recipe, source, say), say)
    if output is not None:
        folder = fresh(partial_path(output))
        statistics.save(folder)
        (folder / "recipe.yaml").write_text(recipe.to_yaml())
        settle(folder, output)
    return statistics


def plan(statistics: Statistics, recipe: Recipe) -> Plan:
    """Scores, budget and kept ids from saved statistics; takes milliseconds."""
    removal, protection, rule = method(recipe)
    check_target(recipe, statistics.groups)
    return make_plan(
        statistics.groups,
        removal(statistics, recipe.weights),
        protection(statistics, recipe.weights) if protection else None,
        target=target(recipe),
        allocator=rule,
        before=ModelSize(**statistics.facts["size"]),
        min_units=recipe.min_experts,
        multiple_of=recipe.multiple_of,
        fingerprint=statistics.fingerprint,
        recipe={**statistics.facts["calibration"], **recipe.planning()},
    )


def prune(
    recipe: Recipe,
    output: Path,
    *,
    statistics: Statistics | None = None,
    ready: Plan | None = None,
    say: Say = lambda _: None,
) -> Pruned:
    """A pruned checkpoint in `output`, from statistics or a plan where one is given."""
    check_output(output)
    source = open_model(recipe)
    heldout = heldout_set(recipe, source)
    if ready is None:
        check_plan_settings(recipe, source)
        if statistics is None:
            statistics = collect(recipe, source, calibration_set(recipe, source, say), say)
        check_same_model(statistics.fingerprint, source, "statistics were")
        ready = plan(statistics, recipe)
    check_same_model(ready.fingerprint, source, "plan was")

    folder = fresh(partial_path(output))
    if statistics is not None:
        statistics.save(folder / FOLDER)
    say(f"cutting {ready.before.parameters:,} parameters to {ready.after.parameters:,}")
    started = time.perf_counter()
    write_model(source, ready.kept, folder)
    say(f"written in {time.perf_counter() - started:.1f} s")
    ready.save(folder / FOLDER / "plan.json")
    (folder / FOLDER / "recipe.yaml").write_text(recipe.to_yaml())
    before = after = None
    if heldout is not None:
        before = measure(recipe, source, heldout, "held-out loss, original")
        after = measure(recipe, Checkpoint(str(folder)), heldout, "held-out loss, pruned")
        losses = {"original": asdict(before), "pruned": asdict(after)}
        (folder / FOLDER / "heldout.json").write_text(json.dumps(losses, indent=1) + "\n")
    settle(folder, output)
    return Pruned(output, ready, before, after)


def open_model(recipe: Recipe) -> Checkpoint:
    """The model's files, checked as far as they can be without loading weights."""
    if recipe.model is None:
        raise ValueError("no model given: name a local directory or a Hub id")
    pick_dtype(recipe.dtype, pick_device(recipe.device))
    source = Checkpoint(recipe.model, recipe.revision, recipe.trust_remote_code)
    assert source.blocks  # finds them, or says what was looked for
    count_key(source.config)
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


def collect(recipe: Recipe, source: Checkpoint, text: CalibrationSet, say: Say) -> Statistics:
    """Load the model and run the calibration set through it, watched."""
    say(
        f"calibrating on {len(text.sequences)} sequences, {text.tokens:,} tokens of "
        f"{', '.join(text.domains)}"
    )
    chosen = choose_engine(recipe, source)
    say(f"engine: {chosen.engine} ({chosen.why})")
    groups, batches = source.groups, text.batches(recipe.batch_size)
    with Progress("calibrating", text.tokens * passes(chosen, source, recipe.taylor)) as progress:
        engine, model = start(source, chosen.engine, recipe.dtype, recipe.device, progress.visit)
        collector = ExpertCollector(find_blocks(model), groups, text.domains, taylor=recipe.taylor)
        with collector:
            engine.run(batches, collector, backward=recipe.taylor)
    say("calibrated: " + ", ".join(f"{k} {v:.1f} s" for k, v in engine.seconds.items()))
    dtype = weight_dtype(source, recipe.dtype, pick_device(recipe.device))
    run = {
        "model": recipe.model, "revision": recipe.revision, "calibration": list(recipe.calibration),
        "samples": len(text.sequences), "length": recipe.length, "seed": recipe.seed,
        "batch_size": recipe.batch_size, "dtype": str(dtype).removeprefix("torch."),
    }  # fmt: skip
    return collector.statistics(
        {**source.fingerprint, "calibration": text.digest},
        {"calibration": run, "size": asdict(source.size), "model_type": source.config.model_type},
    )


def measure(recipe: Recipe, source: Checkpoint, text: CalibrationSet, what: str) -> HeldoutLoss:
    """Held-out loss of one checkpoint."""
    chosen = choose_engine(recipe, source)
    with Progress(what, text.tokens * passes(chosen, source, False)) as progress:
        engine, _ = start(source, chosen.engine, recipe.dtype, recipe.device, progress.visit)
        return heldout_loss(engine, text.batches(recipe.batch_size), text.domains)


def passes(chosen: Choice, source: Checkpoint, backward: bool) -> int:
    """How often an engine goes over the batches: for the progress bar."""
    layers = source.config.get_text_config().num_hidden_layers
    return layers * (2 if backward else 1) if chosen.engine == "streaming" else 1


def choose_engine(recipe: Recipe, source: Checkpoint) -> Choice:
    """The engine that runs this checkpoint here."""
    device = pick_device(recipe.device)
    limit = parse_bytes("--max-memory", recipe.max_memory) if recipe.max_memory else None
    item = weight_dtype(source, recipe.dtype, device).itemsize
    return choose(recipe.engine, source.size, item, device, limit)


def method(recipe: Recipe) -> tuple[Criterion, Criterion | None, str]:
    """Removal score, protection score and allocator that a recipe's method stands for.

    `fair` is FAIR-Pruner's rule: routed output mass against |Taylor|, allocated by ToD. The name of
    a criterion is that criterion with a uniform budget, as its paper has it.
    """
    if recipe.method == "fair":
        removal, rule = recipe.removal or "routed-mass", recipe.allocate or "tod"
    elif recipe.method in criteria():
        removal, rule = recipe.removal or recipe.method, recipe.allocate or "uniform"
    else:
        pick({"fair": None, **criteria()}, recipe.method, "method")
        raise AssertionError
    paired = allocator(rule).needs_protection or recipe.protection or recipe.method == "fair"
    protection = recipe.protection or "taylor"
    return criterion(removal), criterion(protection) if paired else None, rule


def target(recipe: Recipe) -> Target:
    """The recipe's one target."""
    size = dict([parse_size(recipe.size)]) if recipe.size else {}
    return Target(
        mean_kept=recipe.experts,
        total=recipe.total,
        ratio=recipe.ratio,
        tolerance=recipe.tolerance,
        **size,
    )


def check_target(recipe: Recipe, groups: tuple[UnitGroup, ...]) -> None:
    """The budget lies between the fewest experts that routing allows and all of them."""
    target(recipe)
    most, least = max(g.size for g in groups), min(g.floor for g in groups)
    if recipe.experts is not None and not least <= recipe.experts <= most:
        why = "the model has no more" if recipe.experts > most else f"the router picks top {least}"
        raise ValueError(f"--experts {recipe.experts:g}: {why}; choose {least} to {most} per layer")
    total, floor = sum(g.size for g in groups), sum(g.floor for g in groups)
    if recipe.total is not None and not floor <= recipe.total <= total:
        raise ValueError(
            f"--total {recipe.total}: {len(groups)} layers can keep {floor} to {total} experts"
        )
    if recipe.min_experts > most:
        raise ValueError(f"--min-experts {recipe.min_experts}: layers have {most} experts")


def check_plan_settings(recipe: Recipe, source: Checkpoint) -> None:
    """Everything about the plan that can be checked before anything is measured."""
    removal, protection, rule_name = method(recipe)
    check_target(recipe, source.groups)
    # whether a target can be met depends on no score: any will do to try it
    placeholder = Scores(
        "placeholder", {g.name: torch.arange(g.size, dtype=torch.float64) for g in source.groups}
    )
    make_plan(
        source.groups,
        placeholder,
        placeholder,
        target=target(recipe),
        allocator=rule_name,
        before=source.size,
        min_units=recipe.min_experts,
        multiple_of=recipe.multiple_of,
    )
    for rule in (removal, protection):
        if (
            rule
            and not recipe.taylor
            and any(n.startswith("taylor") or n == "rows" for n in rule.needs)
        ):
            raise ValueError(
                f"criterion {rule.name!r} needs Taylor sums, which --no-taylor leaves out"
            )


def check_same_model(fingerprint: dict[str, str], source: Checkpoint, what: str) -> None:
    """The statistics or plan were made from this very model."""
    for part in ("model", "tokenizer"):
        if fingerprint.get(part) != source.fingerprint[part]:
            raise ValueError(
                f"the {what} made from another {part} than that of {source.model}; "
                "calibrate this model, or give the one they belong to"
            )
