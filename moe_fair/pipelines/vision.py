"""The whole flow for images: scores -> budget -> plan -> cut -> fine-tuning -> checkpoint."""

from __future__ import annotations

import copy
import json
import shutil
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from moe_fair.core.interrupts import closing
from moe_fair.core.manifest import FOLDER, write_manifest
from moe_fair.core.output import Place, claim, fresh, partial_path, settle, write_whole
from moe_fair.core.plan import Plan
from moe_fair.core.units import Scores, Statistics
from moe_fair.report.vision import document
from moe_fair.report.write import write_document
from moe_fair.vision.accuracy import latency, top1
from moe_fair.vision.checkpoint import open_pruned, save_pruned
from moe_fair.vision.collect import MeasureConfig, collect
from moe_fair.vision.data import Data, ImageSet, open_data, sample
from moe_fair.vision.finetune import finetune
from moe_fair.vision.gradual import check_method, remove_gradually
from moe_fair.vision.graph import Graph
from moe_fair.vision.identity import identity
from moe_fair.vision.load import Source, example
from moe_fair.vision.plan import Goal, Rules, make
from moe_fair.vision.proof import find_groups
from moe_fair.vision.settings import Settings
from moe_fair.vision.size import Cost, Sizes
from moe_fair.vision.source import open_source
from moe_fair.vision.sparse.settings import SparseSettings
from moe_fair.vision.surgery import cut, cuts_of

Say = Callable[[str], None]


@dataclass(frozen=True)
class Pruned:
    """What a run did.

    Attributes:
        output: the checkpoint's folder.
        plans: one for each step.
        result: accuracies, costs, latencies, what was left whole: the file `result.json`.
    """

    output: Path
    plans: list[Plan]
    result: dict[str, Any]

    def plain(self) -> dict[str, Any]:
        """The result and what the last plan keeps, for JSON."""
        kept = {g.name: len(g.kept) for g in self.plans[-1].groups}
        return {"output": str(self.output), "kept": kept, **self.result}


@dataclass(frozen=True)
class _Run:
    """What every step needs."""

    settings: Settings
    source: Source
    data: Data
    dense: nn.Module
    whole: Cost
    units: int
    work: Path
    say: Say


@torch.inference_mode(False)  # whatever the caller's mode: gradients are needed here
@torch.enable_grad()
def prune(
    settings: Settings, output: Path, *, start_over: bool = False, say: Say = lambda _: None
) -> Pruned:
    """A pruned image classifier in `output`.

    Args:
        start_over: forget the steps and epochs that a killed run finished.

    Raises:
        ValueError: bad input, or a target that cannot be met.
    """
    output = Path(output)  # text will do
    with claim(output) as place:
        return _prune(settings, output, place, start_over, say)


def _prune(settings: Settings, output: Path, place: Place, start_over: bool, say: Say) -> Pruned:
    run = _open(settings, place, start_over, say)
    started = time.perf_counter()
    before = top1(run.dense, run.data.test, settings.batch_size)
    say(f"top-1 of the dense model: {before:.2%} on {len(run.data.test):,} images")
    source, records = run.source, []
    for step in range(1, settings.steps + 1):
        source, record = _step(run, source, step)
        records.append(record)
    plans = [Plan.load(_home(run, s) / "plan.json") for s in range(1, settings.steps + 1)]
    scored = _home(run, settings.steps) / "scored"

    pruned = source.model.to(next(run.dense.parameters()).device).eval()
    x = example(run.source)
    cost = Sizes(pruned, (), x).whole
    result = {
        "settings": settings.plain(),
        "top1": {"dense": before, "pruned": records[-1]["top1_cut"], "final": records[-1]["top1"]},
        "steps": records,
        "cost": {"dense": asdict(run.whole), "pruned": asdict(cost)},
        "latency_ms": latency({"dense": run.dense, "pruned": pruned}, x[:1]),
        "left_whole": records[0]["left_whole"],
        "seconds": time.perf_counter() - started,
    }
    folder = fresh(place.partial)
    save_pruned(pruned, source, source.history, folder)
    (folder / FOLDER).mkdir()
    if scored.exists():  # scores that are taken in training leave no statistics
        Statistics.load(scored).save(folder / FOLDER)
    for step, plan in enumerate(plans, 1):
        name = "plan.json" if settings.steps == 1 else f"plan-{step}.json"
        plan.save(folder / FOLDER / name)
    (folder / FOLDER / "result.json").write_text(json.dumps(result, indent=1) + "\n")
    write_document(document(plans, result), folder / FOLDER / "report.html")
    write_manifest(folder)
    with closing(output):
        settle(folder, place.path)
        shutil.rmtree(run.work)
    return Pruned(output, plans, result)


def _open(settings: Settings, place: Place, start_over: bool, say: Say) -> _Run:
    source, data = open_inputs(settings)
    work = _work(settings, identity(source, data), place, start_over, say)
    x = example(source)
    dense = copy.deepcopy(source.model)
    cpu = copy.deepcopy(source.model).cpu()
    graph = find_groups(cpu, x, heads=settings.heads)
    sizes = Sizes(cpu, graph.groups, x)
    if settings.method:
        check_method(source.model, graph.groups, settings.method)
    units = sum(g.size for g in graph.units)
    say(f"{units:,} units in {len(graph.groups)} groups; layers left whole: {len(graph.whole)}")
    run = _Run(settings, source, data, dense, sizes.whole, units, work, say)
    # whether the target can be met depends on no score: tried before anything is measured
    blank = Scores("blank", {g.name: torch.arange(g.size).double() for g in graph.units})
    make(graph.groups, blank, blank, sizes, rules=_rules(settings), goal=_goal(run, settings.steps))
    return run


def _step(run: _Run, source: Source, step: int) -> tuple[Source, dict[str, Any]]:
    """Score, plan, cut and fine-tune once, or take it from what a killed run left."""
    settings, say, home = run.settings, run.say, _home(run, step)
    said = f"step {step} of {settings.steps}: " if settings.steps > 1 else ""
    if (home / "step.json").is_file():
        say(f"{said}done before")
        done = open_pruned(home, trust_remote_code=True)
        return done, json.loads((home / "step.json").read_text())
    device = next(run.dense.parameters()).device
    if (home / "cut" / "plan.json").is_file():
        say(f"{said}cut before")
        record = json.loads((home / "cut" / "record.json").read_text())
        cut_source = open_pruned(home / "cut", trust_remote_code=True)
    else:
        cut_source, record = _cut(run, source, step, home, said)
    model = cut_source.model.to(device)
    if settings.finetune_epochs:
        model = finetune(
            model,
            run.data.train,
            settings.training(),
            teacher=run.dense if settings.distill else None,
            work=home / "training",
            say=lambda line: say(said + line),
        )
    record["top1"] = top1(model, run.data.test, settings.batch_size)
    say(f"{said}top-1 {record['top1_cut']:.2%} after the cut, {record['top1']:.2%} at its end")
    done = replace(cut_source, model=model)
    partial = fresh(partial_path(home))
    save_pruned(model, done, done.history, partial)
    if (home / "cut" / "scored").exists():
        shutil.copytree(home / "cut" / "scored", partial / "scored")
    shutil.copy(home / "cut" / "plan.json", partial / "plan.json")
    (partial / "step.json").write_text(json.dumps(record))
    shutil.rmtree(home)
    partial.rename(home)
    return done, record


def _cut(
    run: _Run, source: Source, step: int, home: Path, said: str
) -> tuple[Source, dict[str, Any]]:
    settings, say = run.settings, run.say
    x = example(run.source)
    device = next(run.dense.parameters()).device
    cpu = source.model.cpu()
    graph = find_groups(cpu, x, heads=settings.heads)
    sizes = Sizes(cpu, graph.groups, x)
    model = cpu.to(device)
    statistics: Statistics | None = None
    removed: dict[str, Any] = {}
    if settings.method:
        pace = settings.schedule(run.units)
        plan, history = remove_gradually(
            model,
            graph,
            sizes,
            run.data.train,
            schedule=pace,
            training=settings.training(),
            goal=_goal(run, step),
            rules=_rules(settings),
            teacher=run.dense if settings.distill else None,
            work=home / "removing",
            say=say,
        )
        note = "scores are the last step's; units that left in an earlier one have 0"
        plan = replace(plan, notes=[*plan.notes, note])
        removed = {"schedule": asdict(pace), "removal": history}
    else:
        started = time.perf_counter()
        statistics = score(model, graph, run.data.train, settings)
        say(f"{said}scored in {time.perf_counter() - started:.1f} s")
        removal, protection = settings.scores()
        plan = make(
            graph.groups,
            removal(statistics),
            protection(statistics) if protection else None,
            sizes,
            rules=_rules(settings),
            goal=_goal(run, step),
        )
    plan = replace(plan, recipe=settings.plain())
    cuts = cuts_of(graph.groups, plan.kept)
    cut(model, cuts)
    done = replace(source, model=model, history=(*source.history, cuts))
    record = {
        "top1_cut": top1(model, run.data.test, settings.batch_size),
        "units": {g.name: len(g.kept) for g in plan.groups},
        "cost": asdict(sizes.at({g.name: len(g.kept) for g in plan.groups})),
        "left_whole": graph.whole,
        **removed,
    }
    partial = fresh(partial_path(home))
    save_pruned(model, done, done.history, partial)
    if statistics is not None:
        statistics.save(partial / "scored")
    plan.save(partial / "plan.json")
    (partial / "record.json").write_text(json.dumps(record))
    home.mkdir(parents=True, exist_ok=True)
    partial.rename(home / "cut")
    shutil.rmtree(home / "removing", ignore_errors=True)
    return done, record


def score(model: nn.Module, graph: Graph, images: ImageSet, settings: Settings) -> Statistics:
    """Statistics that the settings' criteria need, on a sample of the images."""
    x, y = sample(images, settings.samples, settings.seed)
    needs = {n for c in settings.scores() if c for n in c.needs}
    watch = MeasureConfig(settings.batch_size, settings.directions, settings.seed, settings.memory)
    facts = {"model": settings.model, "data": settings.data, "samples": len(x)}
    return collect(model, graph, x, y, needs=needs, watch=watch, metadata=facts)


def _rules(settings: Settings) -> Rules:
    # while training the units of all groups are ranked together
    return Rules(
        "global" if settings.method else settings.allocate, settings.min_channels, settings.align
    )


def _goal(run: _Run, step: int) -> Goal:
    """The target after a step: the share that leaves grows evenly from step to step."""
    s, part = run.settings, step / run.settings.steps
    if s.ratio is not None:
        return Goal(units=round(run.units * (1 - s.ratio * part)))
    if s.flops is not None:
        return Goal(operations=int(run.whole.operations * (1 - s.flops * part)))
    if s.params is not None:
        return Goal(parameters=int(run.whole.parameters * (1 - s.params * part)))
    return Goal(tolerance=s.tolerance)


def _home(run: _Run, step: int) -> Path:
    return run.work / f"step-{step}"


def _work(
    settings: Settings, about: dict[str, str], place: Place, start_over: bool, say: Say
) -> Path:
    """Where finished steps and epochs wait for the result; emptied where they are another run's.

    Args:
        about: what they depend on beside the settings, see `identity`.
    """
    work = place.beside("pruning")
    key = {"settings": json.loads(json.dumps(settings.plain())), **about}
    record = work / "settings.json"
    found = _read_key(record)
    if work.exists() and (start_over or found != key):
        if not start_over:
            other = [k for k, v in key.items() if k in found and found[k] != v] or ["settings"]
            say(f"{work} holds a run with other {' and '.join(other)}: starting over")
        shutil.rmtree(work)
    write_whole(record, json.dumps(key, sort_keys=True))
    return work


def _read_key(record: Path) -> dict[str, Any]:
    """What an earlier run noted down; empty where there was none."""
    try:
        found = json.loads(record.read_text())
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def _matched(images: ImageSet, names: tuple[str, ...] | None) -> ImageSet:
    """Labels as the model numbers them, where both sides name their classes alike."""
    if names is None or not set(images.classes) <= set(names):
        return images
    places = [names.index(c) for c in images.classes]
    if places == list(range(len(places))):
        return images
    labels = [places[i] for i in images.labels.tolist()]
    return images.relabelled(labels, names)


def _check_classes(model: nn.Module, data: Data, x: torch.Tensor) -> None:
    from moe_fair.vision.graph import logits

    with torch.no_grad():
        outputs = logits(model, x.to(next(model.parameters()).device)).shape[-1]
    most = max(int(part.labels.max()) for part in (data.train, data.test))
    if most >= outputs:
        raise ValueError(
            f"{data.train.name} has labels up to {most} and the model has {outputs} outputs"
        )


def open_inputs(settings: Settings | SparseSettings) -> tuple[Source, Data]:
    """The model that the settings name, on its device, and its data, labels as the model has them.

    Raises:
        ValueError: one of them is not there, or they do not fit together.
    """
    torch.manual_seed(settings.seed)  # a function may draw the weights that it gives
    source = open_source(
        settings.model,
        weights=settings.weights_path(),
        image_size=settings.image_size,
        mean=settings.mean,
        std=settings.std,
        revision=settings.revision,
        trust_remote_code=settings.trust_remote_code,
        allow_pickle=settings.allow_pickle,
    )
    source.model.to(_device(settings.device))
    data = open_data(settings.data, source.transform)
    data = Data(_matched(data.train, source.labels), _matched(data.test, source.labels))
    _check_classes(source.model, data, example(source))
    return source, data


def _device(name: str) -> torch.device:
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as e:
        raise ValueError(f"--device {name!r}: {' '.join(str(e).split())[:160]}") from e
    return device
