"""The whole flow for images: scores -> budget -> plan -> cut -> fine-tuning -> checkpoint."""

from __future__ import annotations

import json
import time
from contextlib import nullcontext
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from moe_fair.core.manifest import FOLDER
from moe_fair.core.output import Place, claim, fresh
from moe_fair.core.plan import Plan
from moe_fair.core.say import Say
from moe_fair.core.units import Scores, Statistics
from moe_fair.pipelines.finish import name_result, verify_result
from moe_fair.report.vision import document
from moe_fair.report.write import write_document
from moe_fair.vision.accuracy import GUESSED, guessed, latency, top1
from moe_fair.vision.apart import Elsewhere, set_apart
from moe_fair.vision.checkpoint import save_pruned
from moe_fair.vision.collect import collect
from moe_fair.vision.data import sample
from moe_fair.vision.finetune import check_trained, finetune
from moe_fair.vision.gradual import check_method, remove_gradually
from moe_fair.vision.graph import Graph
from moe_fair.vision.identity import identity
from moe_fair.vision.inputs import open_inputs
from moe_fair.vision.load import Source, example
from moe_fair.vision.plan import Goal, make
from moe_fair.vision.proof import find_groups
from moe_fair.vision.reload import check_reloads, checked_afresh
from moe_fair.vision.settings import Settings
from moe_fair.vision.size import Sizes
from moe_fair.vision.step_folder import Record, StepFolder, claim_steps
from moe_fair.vision.surgery import cut, cuts_of
from moe_fair.vision.targets import goal, rules
from moe_fair.vision.trace import copied
from moe_fair.vision.unit_outputs import MeasureConfig


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


@torch.inference_mode(False)  # whatever the caller's mode: gradients are needed here
@torch.enable_grad()
def prune(
    settings: Settings,
    output: Path,
    *,
    start_over: bool = False,
    own_process: bool = False,
    say: Say = lambda _: None,
) -> Pruned:
    """A pruned image classifier in `output`.

    Args:
        start_over: forget the steps and epochs that a killed run finished.
        own_process: this process has nothing of any model yet; see `set_apart`.

    Raises:
        ValueError: bad input, or a target that cannot be met.
    """
    output = Path(output)  # text will do
    with (
        set_apart(settings.model) if own_process else nullcontext() as apart,
        claim(output) as place,
    ):
        return _prune(settings, output, place, apart, start_over, say)


def _prune(
    settings: Settings,
    output: Path,
    place: Place,
    apart: Elsewhere | None,
    start_over: bool,
    say: Say,
) -> Pruned:
    run = _Pruning(settings, place, start_over, say)
    run.check()
    dense = run.evaluate(run.dense)
    say(f"top-1 of the dense model: {dense:.2%} on {len(run.data.test):,} images")
    if guessed(dense, run.data.test):
        say(f"note: {GUESSED}")
    source, records = run.source, []
    for step in range(1, settings.steps + 1):
        source, record = run.step(source, step)
        records.append(record)
    result = run.compare(source, dense, records)
    plans = run.write(source)
    with checked_afresh(run.folder, source.model, run.example, apart):
        run.write_report(plans, result)
        run.verify()
    run.finish(output)
    return Pruned(output, plans, result)


class _Pruning:
    """The steps of one `prune`."""

    def __init__(self, settings: Settings, place: Place, start_over: bool, say: Say) -> None:
        """Open the model, its images, and what a killed run has left."""
        self.settings, self.place, self.say = settings, place, say
        self.source, self.data = open_inputs(settings)
        self.work, self.folder = place.beside("pruning"), place.partial
        about = identity(self.source, self.data)
        claim_steps(self.work, settings.plain(), about, start_over, say)
        self.started = time.perf_counter()
        self.example = example(self.source)
        self.real = self.data.train.part([0, len(self.data.train) - 1]).tensors()[0]
        self.dense = copied(self.source.model)
        self.device = next(self.dense.parameters()).device

    def check(self) -> None:
        """Find the units, and whether the target can be met; that depends on no score."""
        settings, source = self.settings, self.source
        check_reloads(source, self.example)
        graph, sizes = self.first = self._units(source.model.cpu())
        source.model.to(self.device)
        if settings.method:
            check_method(source.model, graph.groups, settings.method)
        self.whole, self.units = sizes.whole, sum(g.size for g in graph.units)
        self.say(
            f"{self.units:,} units in {len(graph.groups)} groups; layers left whole: "
            f"{len(graph.whole)}"
        )
        blank = Scores("blank", {g.name: torch.arange(g.size).double() for g in graph.units})
        goal = self._goal(settings.steps)
        make(graph.groups, blank, blank, sizes, rules=rules(settings), goal=goal)

    def step(self, source: Source, step: int) -> tuple[Source, Record]:
        """Measure, decide, cut and fine-tune once, or take it from what a killed run left."""
        kept = StepFolder(self.work / f"step-{step}")
        said = f"step {step} of {self.settings.steps}: " if self.settings.steps > 1 else ""
        if (found := kept.finished()) is not None:
            self.say(f"{said}done before")
            return found
        if (found := kept.cut()) is not None:
            self.say(f"{said}cut before")
            source, record = found
        else:
            source, record = self.remove(source, step, kept, said)
        source = self.finetune(source, kept, said)
        trained = self.settings.finetune_epochs
        record["top1"] = self.evaluate(source.model) if trained else record["top1_cut"]
        after = f"{record['top1']:.2%} at its end"
        self.say(f"{said}top-1 {record['top1_cut']:.2%} after the cut, {after}")
        kept.keep_finished(source, record)
        return source, record

    def remove(
        self, source: Source, step: int, kept: StepFolder, said: str
    ) -> tuple[Source, Record]:
        """Measure, decide and cut; with a method the units leave while the model trains."""
        if step == 1:  # proven on this very model when the run began
            graph, sizes = self.first
        else:
            graph, sizes = self._units(source.model.cpu())
            source.model.to(self.device)
        statistics: Statistics | None = None
        history: dict[str, Any] = {}
        if self.settings.method:
            plan, history = self.train_and_decide(source.model, graph, sizes, kept)
        else:
            started = time.perf_counter()
            statistics = self.measure(source.model, graph)
            self.say(f"{said}scored in {time.perf_counter() - started:.1f} s")
            plan = self.decide(statistics, graph, sizes, step)
        plan = replace(plan, recipe=self.settings.plain())
        source = self.cut(source, graph, plan)
        counts = {g.name: len(g.kept) for g in plan.groups}
        record = {
            "top1_cut": self.evaluate(source.model),
            "units": counts,
            "cost": asdict(sizes.at(counts)),
            "shares": sizes.shares(),
            "left_whole": graph.whole,
            **history,
        }
        kept.keep_cut(source, record, plan, statistics)
        return source, record

    def measure(self, model: nn.Module, graph: Graph) -> Statistics:
        """Statistics that the settings' criteria need, on a sample of the images."""
        s = self.settings
        x, y = sample(self.data.train, s.samples, s.seed)
        needs = {n for c in s.scores() if c for n in c.needs}
        watch = MeasureConfig(s.batch_size, s.directions, s.seed, s.memory)
        facts = {"model": s.model, "data": s.data, "samples": len(x)}
        return collect(model, graph, x, y, needs=needs, watch=watch, metadata=facts)

    def decide(self, statistics: Statistics, graph: Graph, sizes: Sizes, step: int) -> Plan:
        """The plan of a step."""
        removal, protection = self.settings.scores()
        return make(
            graph.groups,
            removal(statistics),
            protection(statistics) if protection else None,
            sizes,
            rules=rules(self.settings),
            goal=self._goal(step),
        )

    def train_and_decide(
        self, model: nn.Module, graph: Graph, sizes: Sizes, kept: StepFolder
    ) -> tuple[Plan, dict[str, Any]]:
        """The plan of units that left one after another in training; how that went."""
        settings = self.settings
        schedule = settings.schedule(self.units)
        plan, history = remove_gradually(
            model,
            graph,
            sizes,
            self.data.train,
            schedule=schedule,
            training=settings.training(),
            goal=self._goal(settings.steps),
            rules=rules(settings),
            teacher=self.dense if settings.distill else None,
            work=kept.removing,
            say=self.say,
        )
        note = "scores are the last step's; units that left in an earlier one have 0"
        plan = replace(plan, notes=[*plan.notes, note])
        return plan, {"schedule": asdict(schedule), "removal": history}

    def cut(self, source: Source, graph: Graph, plan: Plan) -> Source:
        """The model without the units that leave; in place."""
        cuts = cuts_of(graph.groups, plan.kept)
        cut(source.model, cuts)
        return replace(source, history=(*source.history, cuts))

    def finetune(self, source: Source, kept: StepFolder, said: str) -> Source:
        """The cut model, trained where that is asked for."""
        model, settings = source.model.to(self.device), self.settings
        if settings.finetune_epochs:
            model = finetune(
                model,
                self.data.train,
                settings.training(),
                teacher=self.dense if settings.distill else None,
                work=kept.training,
                say=lambda line: self.say(said + line),
            )
        check_trained(model)
        return replace(source, model=model)

    def evaluate(self, model: nn.Module) -> float:
        """Top-1 accuracy on the images for testing."""
        return top1(model, self.data.test, self.settings.batch_size)

    def compare(self, source: Source, dense: float, records: list[Record]) -> dict[str, Any]:
        """What the dense and the pruned model are and cost: `result.json`."""
        pruned = source.model.to(self.device).eval()
        cost, last = Sizes(pruned, (), self.example).whole, records[-1]
        return {
            "settings": self.settings.plain(),
            "images": {
                "train": len(self.data.train),
                "test": len(self.data.test),
                "classes": len(self.data.test.classes),
            },
            "notes": [GUESSED] if guessed(dense, self.data.test) else [],
            "top1": {"dense": dense, "pruned": last["top1_cut"], "final": last["top1"]},
            "steps": records,
            "cost": {"dense": asdict(self.whole), "pruned": asdict(cost)},
            "latency_ms": latency({"dense": self.dense, "pruned": pruned}, self.example[:1]),
            "left_whole": records[0]["left_whole"],
            "seconds": time.perf_counter() - self.started,
        }

    def write(self, source: Source) -> list[Plan]:
        """The checkpoint and what explains it, under the temporary name; the plans."""
        save_pruned(source.model, source, source.history, fresh(self.folder))
        notes = fresh(self.folder / FOLDER)
        steps = [StepFolder(self.work / f"step-{i + 1}") for i in range(self.settings.steps)]
        if (statistics := steps[-1].statistics()) is not None:
            statistics.save(notes)
        plans = [step.plan() for step in steps]
        for number, plan in enumerate(plans, 1):
            plan.save(notes / ("plan.json" if len(plans) == 1 else f"plan-{number}.json"))
        return plans

    def write_report(self, plans: list[Plan], result: dict[str, Any]) -> None:
        """What was measured, as JSON and as a page."""
        notes = self.folder / FOLDER
        (notes / "result.json").write_text(json.dumps(result, indent=1) + "\n")
        write_document(document(plans, result), notes / "report.html")

    def verify(self) -> None:
        """Check the whole result, built anew by the code that this run was started with."""
        verify_result(self.folder, self.say, trust_remote_code=True)

    def finish(self, output: Path) -> None:
        """Give the result its name."""
        name_result(self.place, output, self.work)

    def _units(self, model: nn.Module) -> tuple[Graph, Sizes]:
        graph = find_groups(model, self.example, heads=self.settings.heads, real=self.real)
        return graph, Sizes(model, graph.groups, self.example)

    def _goal(self, step: int) -> Goal:
        return goal(self.settings, self.units, self.whole, step)
