"""What a run of `prune` would do and take, found without doing it.

Every check of a run is made (`preflight.check_prune`), one layer is read and timed (`probe`), and
its times are added up over layers, tokens and passes. Nothing is written.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from moe_fair.core.cost_curves import depths_to_measure
from moe_fair.core.engine_facts import Layout, verdicts
from moe_fair.core.output import check_output, find_place
from moe_fair.core.plan import Plan
from moe_fair.core.quote import first_line
from moe_fair.core.recipe import TARGETS, Recipe
from moe_fair.core.say import Say
from moe_fair.core.settings import flag
from moe_fair.core.units import Statistics
from moe_fair.engines.device import pick_device
from moe_fair.engines.memory import free_memory, usable_memory
from moe_fair.engines.processes import current_team
from moe_fair.moe.calibration_text import CalibrationSet
from moe_fair.moe.engine_choice import weight_dtype
from moe_fair.moe.healing import LOOKS
from moe_fair.moe.healing_text import healing_text
from moe_fair.moe.layer_distillation import COPIED_EPOCHS, MOST_EPOCHS, PASSES
from moe_fair.moe.repairs import repair
from moe_fair.moe.resampled_text import MOST
from moe_fair.moe.routed_output import KEPT_BYTES
from moe_fair.pipelines.calibrate import choose_engine, room_of
from moe_fair.pipelines.checks import free_space, method
from moe_fair.pipelines.cost_probe import Costs, Line, hidden_width, probe
from moe_fair.pipelines.disk import disk_needs, kept_on_average
from moe_fair.pipelines.mtp_heads import UNIFORM
from moe_fair.pipelines.preflight import Job, check_prune, merges_experts
from moe_fair.pipelines.removal_costs import share
from moe_fair.pipelines.repair import copies_of, step_sequences
from moe_fair.pipelines.rivals import rivals
from moe_fair.pipelines.serving import planned_layout

RECOMPUTED = 2  # what features cost that are computed again instead of kept


@dataclass(frozen=True)
class Stage:
    """One stage of a run.

    Attributes:
        name: what it does.
        tokens: of the text that it runs.
        passes: how that goes through the model.
        seconds: the estimate; None where there is none.
    """

    name: str
    tokens: int
    passes: str
    seconds: float | None


@dataclass(frozen=True)
class DryRun:
    """What a run would do.

    Attributes:
        output: the directory that it would make.
        checks: what was checked, and what was found.
        engine, why: of the passes over text, and why it is this one.
        memory, disk: bytes by what they are for; `free` and what is needed.
        stages: in their order.
        seconds: of all stages; None where no layer could be timed.
        bytes_read: of weights, for the timing.
        notes: what else should be known.
    """

    output: str
    checks: dict[str, str]
    engine: str
    why: str
    memory: dict[str, int]
    disk: dict[str, int]
    stages: list[Stage]
    seconds: float | None
    bytes_read: int
    notes: list[str]


def dry_run(
    recipe: Recipe,
    output: Path,
    *,
    statistics: Statistics | None = None,
    ready: Plan | None = None,
    say: Say = lambda _: None,
) -> DryRun:
    """All checks of `pipeline.prune`, and what it would take here.

    Raises:
        ValueError: whatever the run would refuse before it loads weights.
    """
    team = current_team()
    notes: list[str] = []

    def keep(line: str) -> None:
        say(line)
        if line.startswith("note: "):
            notes.append(line.removeprefix("note: "))

    place = find_place(output)
    if team.first:
        check_output(output, place)
    job = check_prune(recipe, output, place, statistics, ready, keep, team, dry=True)
    chosen = choose_engine(job.recipe, job.source, team.node_size)
    costs = None
    if team.first and (job.run.reads_text or job.heldout is not None):
        say("timing one layer")
        try:
            costs = _timed(job, chosen.engine)
        except (ValueError, RuntimeError) as e:  # the checks have passed all the same
            notes.append(f"no estimate of the time: {first_line(e)}")
    stages = list(_stages(job, chosen.engine, costs, team.size))
    return DryRun(
        output=str(output),
        checks=_checks(job, output),
        engine=chosen.engine,
        why=chosen.why,
        memory=_memory(job, chosen.engine),
        disk=_disk(job, output),
        stages=stages,
        seconds=None if costs is None else sum(s.seconds or 0.0 for s in stages),
        bytes_read=costs.bytes if costs else 0,
        notes=notes,
    )


def _timed(job: Job, engine: str) -> Costs:
    """One layer's costs, of text as long as the run's.

    Raises:
        ValueError, RuntimeError: layers do not run alone, or not on this machine.
    """
    texts = [t for t in (job.text, job.heldout) if t is not None]
    length = max(len(ids) for t in texts for ids, _ in t.sequences)
    return probe(job.recipe, job.collected, job.source, engine, job.repair, _kept(job), length)


def _kept(job: Job) -> int:
    return kept_on_average(job.source, job.after)


def _stages(job: Job, engine: str, costs: Costs | None, processes: int) -> Iterator[Stage]:
    """Every stage, with its time where a layer was timed."""
    c, source = costs, job.source
    layers = int(source.config.get_text_config().num_hidden_layers)
    streamed = engine == "streaming"
    load = layers * c.load if c else 0.0

    def stage(name: str, tokens: int, passes: str, seconds: float) -> Stage:
        return Stage(name, tokens, passes, seconds if c else None)

    if job.sampled is not None:
        wanted = job.sampled.wanted
        steps = -(-wanted.expected // wanted.documents)
        step = layers * c.forward.at(wanted.documents, 1) + wanted.documents * c.head if c else 0.0
        what = f"one token at a time, {wanted.documents} documents together"
        if job.recipe.server is not None:
            yield Stage("sample own text", wanted.expected, "by the server", None)
        else:
            yield stage("sample own text", wanted.expected, what, steps * step / processes + load)
    if job.run.collects and job.seen is not None:
        n, again = job.seen.tokens, job.collected.backward
        what = "forward and backward" if again else "forward"
        batches = len(job.seen.batches(job.recipe.batch_size))
        chunks = -(-batches // job.recipe.save_every)
        reads = chunks * (2 if again else 1) if streamed else 1
        work = layers * c.learned.at(n, batches) if c else 0.0
        work += n * (c.head_learned if again else c.head) if c else 0.0
        yield stage("calibrate", n, what, work / processes + reads * load)
    if job.run.measures and job.text is not None:
        part, sets = share(job.text, job.recipe.curve_samples), 0
        for g in source.groups:
            sets += g.size if job.alone else 0
            sets += len(depths_to_measure(g)) if job.costly else 0
        batches = len(part.batches(job.recipe.batch_size))
        work = sets * _through(c, part.tokens, batches, layers / 2)
        yield stage("measure removals", part.tokens, f"{sets} removals, forward", work + load)
    if job.trial is not None:
        yield _trials(job, job.trial, c, load)
    if job.repair is not None and job.text is not None:
        yield _repair(job, c, load)
    if job.recipe.heal and job.text is not None:
        yield _heal(job, c, load)
    # every byte is read, written, and compared again
    work = (source.size.bytes + 3 * job.after.bytes) * c.load / c.bytes if c else 0.0
    yield stage("cut and verify", 0, f"{job.after.bytes / 1e9:.2f} GB written", work)
    if job.heldout is not None:
        n = job.heldout.tokens
        work = _through(c, n, len(job.heldout.batches(job.recipe.batch_size)), layers)
        text = "original and pruned, forward"
        yield stage("held-out losses", n, text, 2 * (work / processes + load))


def _trials(job: Job, trial: CalibrationSet, c: Costs | None, load: float) -> Stage:
    """The trials' stage: the plans as they are, or each repaired."""
    plans = 1 + len(rivals(job.recipe))
    layers = int(job.source.config.get_text_config().num_hidden_layers)
    what, taught, each = f"the model and up to {plans} plans, forward", 0, 0.0
    if job.teaching is not None and job.repair is not None:
        what += ", each fitted"
        taught, each = job.teaching.tokens, 1 / (len(repair(job.repair).ridges) + 1)
    tokens = trial.tokens + taught
    if c is None:
        return Stage("try plans", tokens, what, None)
    batches = len(trial.batches(job.recipe.batch_size))
    seconds = (1 + plans) * (layers * c.tried.at(tokens, batches) + trial.tokens * c.head) + load
    seconds += plans * len(job.source.blocks) * c.fit.at(tokens, 1) * each  # at one strength
    return Stage("try plans", tokens, what, seconds)


def _repair(job: Job, c: Costs | None, load: float) -> Stage:
    """The repair's stage: all layers once, with copies of a short text, and epochs of training."""
    assert job.repair is not None
    assert job.text is not None
    text, copies = job.text, copies_of(job.text, job.repair)
    n = text.tokens * (1 + copies)
    trains = bool(getattr(repair(job.repair), "trains", False))
    most = COPIED_EPOCHS if copies >= 3 else MOST_EPOCHS
    epochs = min(most, max(1, PASSES // n)) if trains else 0
    what = f"{job.repair}, layer by layer"
    what += f", {copies} copies" if copies else ""
    what += f", {epochs} epochs" if trains else ""
    if c is None:
        return Stage("repair", n, what, None)
    layers = int(job.source.config.get_text_config().num_hidden_layers)
    blocks, block = len(job.source.blocks), job.source.blocks[0]
    steps = -(-n // (step_sequences(job.recipe) * job.recipe.length))
    features = n * block.top_k * hidden_width(block.experts) * 4
    token = c.fit.token * (RECOMPUTED if features > KEPT_BYTES else 1)
    fit = Line(c.fit.fixed, token)
    seconds = blocks * (fit.at(n, 1) + epochs * c.train.at(n, steps))
    seconds += 3 * layers * c.forward.at(n, steps)  # original, cut, and repaired
    if copies:
        batches = len(text.batches(step_sequences(job.recipe)))
        seconds += _through(c, text.tokens, batches, layers)
        seconds += text.tokens * c.drawn * copies / MOST + load
    return Stage("repair", n, what, seconds + load)


def _heal(job: Job, c: Costs | None, load: float) -> Stage:
    """Healing's: the original once forward, the pruned model forward and backward."""
    assert job.text is not None
    its = healing_text(job.text, job.recipe.heal, job.recipe.seed)
    what = f"{len(its.steps)} steps end to end, and {LOOKS} looks at what judges"
    if c is None:
        return Stage("heal", its.tokens, what, None)
    layers = int(job.source.config.get_text_config().num_hidden_layers)
    judged = sum(its.length(i) for i in its.judging)
    seconds = _through(c, job.text.tokens, len(its.steps), layers) + 2 * load
    seconds += layers * c.learned.at(its.tokens, len(its.steps)) + its.tokens * c.head_learned
    seconds += (LOOKS + 1) * _through(c, judged, len(its.judging), layers)
    return Stage("heal", its.tokens, what, seconds)


def _through(c: Costs | None, tokens: int, batches: int, layers: float) -> float:
    """Seconds of a text once forward through so many layers and the output layer."""
    return layers * c.forward.at(tokens, batches) + tokens * c.head if c else 0.0


def _checks(job: Job, output: Path) -> dict[str, str]:
    """What was checked, for the reader."""
    source, groups = job.source, job.source.groups
    kept = sum(g.size for g in groups) - round(
        (source.size.parameters - job.after.parameters) / max(1, groups[0].unit_parameters)
    )
    removal, protection, rule = method(job.recipe)
    scores = removal.name + (f" against {protection.name}" if protection else "")
    found = {
        "output": f"{output} is new",
        "model": f"{source.config.model_type}, {len(groups)} layers of {groups[0].size} experts, "
        f"top {source.blocks[0].top_k}",
    }
    if job.plan is not None:
        found["plan"] = "of this model, and routing can work with what it keeps"
    else:
        found["method"] = f"{rule} on {scores}"
        if job.statistics is not None:
            found["statistics"] = "of this model, and hold what the method needs"
    wanted = "" if job.plan is not None else _target(job.recipe)
    found["target"] = (
        f"{wanted}about {kept} of {sum(g.size for g in groups)} experts kept, "
        f"{source.size.parameters:,} -> {job.after.parameters:,} parameters"
    )
    found["served by"] = _served(job, rule)
    found["repair"] = job.repair or "none"
    if job.recipe.heal:
        found["healing"] = "every domain has sequences that judge, and what changes can be written"
    for name, text in (("calibration text", job.text), ("held-out text", job.heldout)):
        if text is not None:
            found[name] = _text(text)
            if text is job.text and job.sampled is not None:
                found[name] = _text(text).rpartition(", ")[0] + ", sampled when it runs"
    return found


def _served(job: Job, rule: str) -> str:
    """What every engine does with the result, as far as the allocator says which it will be."""
    kind = job.source.config.model_type
    layout = Layout(kind, (), equal=rule in UNIFORM)
    if job.plan is not None:
        layout = planned_layout(job.plan, kind)
    return ", ".join(f"{v.title}: {v.serves}" for v in verdicts(layout, "OUT"))


def _target(recipe: Recipe) -> str:
    given = {flag(t): getattr(recipe, t) for t in TARGETS if getattr(recipe, t) is not None}
    return "".join(f"{name} {v:g}: " if isinstance(v, float) else f"{name} {v}: "
                   for name, v in given.items())  # fmt: skip


def _text(text: CalibrationSet) -> str:
    return (
        f"{len(text.sequences)} sequences, {text.tokens:,} tokens of {', '.join(text.domains)}, "
        f"sha256 {text.digest[:12]}"
    )


def _memory(job: Job, engine: str) -> dict[str, int]:
    """Bytes of the machine's or the device's memory."""
    source, device = job.source, pick_device(job.recipe.device)
    item = weight_dtype(source, job.recipe.dtype, device).itemsize
    layer = sum(g.size * g.unit_parameters for g in source.groups) // len(source.groups)
    rest = source.size.parameters - layer * len(source.groups)
    found = {"free": free_memory(device), "weights": source.size.parameters * item}
    if engine == "streaming":
        its = layer * item
        room = room_of(job.recipe) or usable_memory(device)
        if source.packing is not None and its > room:  # they stay packed
            its = sum(g.size * g.unit_bytes for g in source.groups) // len(source.groups)
        found["weights"] = its + rest * item
    if engine == "streaming" and job.text is not None:
        width = source.config.get_text_config().hidden_size
        found["activations"] = job.text.tokens * width * item
    if job.repair is not None and getattr(repair(job.repair), "trains", False):
        kept = layer * _kept(job) // source.groups[0].size
        found["repair"] = kept * 16  # float32: weights, their gradient and AdamW's two moments
    if job.recipe.heal:  # as they run and as they were, and a gradient at a time
        found["healing"] = 2 * item * job.after.parameters
    return found


def _disk(job: Job, output: Path) -> dict[str, int]:
    """Bytes of the disk that the result shall lie on."""
    tokens = job.text.tokens if job.text is not None else 0
    rewrites = (job.repair is not None) + merges_experts(job.recipe, job.plan)
    needs = disk_needs(job.recipe, job.source, job.after, rewrites=rewrites, tokens=tokens)
    return {"free": free_space(find_place(output).partial), **needs}
