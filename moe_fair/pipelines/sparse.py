"""The whole flow: a rule's counts per layer -> zeros -> repair -> checkpoint."""

from __future__ import annotations

import json
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from moe_fair.core.manifest import FOLDER
from moe_fair.core.output import Place, claim, fresh
from moe_fair.core.say import Say
from moe_fair.core.units import Budget
from moe_fair.pipelines.finish import name_result, verify_result
from moe_fair.report.sparse import document
from moe_fair.report.write import write_document
from moe_fair.vision.accuracy import top1
from moe_fair.vision.checkpoint import save_pruned
from moe_fair.vision.data import draw
from moe_fair.vision.inputs import open_inputs
from moe_fair.vision.load import example
from moe_fair.vision.reload import check_reloads, checked_afresh
from moe_fair.vision.sparse.fill import check_total
from moe_fair.vision.sparse.layer_table import layer_table
from moe_fair.vision.sparse.layers import Net, find_layers, keep_largest, zeros
from moe_fair.vision.sparse.repair import Moments, match_variance, moments
from moe_fair.vision.sparse.rules import rule
from moe_fair.vision.sparse.settings import SparseSettings


@dataclass(frozen=True)
class Sparse:
    """What a run did.

    Attributes:
        output: the checkpoint's folder.
        result: accuracies, sparsity per layer, what stayed dense: the file `result.json`.
    """

    output: Path
    result: dict[str, Any]

    def plain(self) -> dict[str, Any]:
        """The result for JSON."""
        return {"output": str(self.output), **self.result}


@torch.inference_mode(False)  # whatever the caller's mode: gradients are needed here
@torch.enable_grad()
def sparsify(settings: SparseSettings, output: Path, *, say: Say = lambda _: None) -> Sparse:
    """An image classifier with so many of its weights at zero in `output`.

    Raises:
        ValueError: bad input, or a sparsity that cannot be met.
    """
    output = Path(output)  # text will do
    with claim(output) as place:
        return _sparsify(settings, output, place, say)


def _sparsify(settings: SparseSettings, output: Path, place: Place, say: Say) -> Sparse:
    run = _Sparsifying(settings, place, say)
    run.check()
    top = {"dense": run.evaluate()}
    say(f"top-1 of the dense model: {top['dense']:.2%} on {len(run.data.test):,} images")
    dense = run.measure()
    budget = run.decide()
    run.cut(budget)
    top["pruned"] = run.evaluate()
    say(
        f"top-1 with {settings.sparsity:.2%} of the weights of {len(run.layers)} layers at zero, "
        f"{(run.total - run.keep) / run.parameters:.2%} of all parameters: {top['pruned']:.2%}"
    )
    shifts = run.repair(dense)
    top["final"] = run.evaluate()
    run.write()
    result = run.compare(top, budget, shifts)
    with checked_afresh(run.folder, run.model, example(run.source)):
        run.write_report(result)
        run.verify()
    run.finish(output)
    return Sparse(output, result)


class _Sparsifying:
    """The steps of one `sparsify`."""

    def __init__(self, settings: SparseSettings, place: Place, say: Say) -> None:
        """Open the model and its images."""
        self.settings, self.place, self.say = settings, place, say
        self.folder, self.started = place.partial, time.perf_counter()
        self.source, self.data = open_inputs(settings)
        self.model = self.source.model

    def check(self) -> None:
        """Find the layers, and whether they can hold so many zeros."""
        check_reloads(self.source, example(self.source))
        self.layers, self.dense = find_layers(self.model, example(self.source))
        self.total = sum(x.size for x in self.layers)
        self.parameters = sum(p.numel() for p in self.model.parameters())  # shared ones once
        self.keep = self.total - round(self.settings.sparsity * self.total)
        check_total(self.layers, self.keep)
        self.say(
            f"{self.total:,} weights in {len(self.layers)} layers; {len(self.dense)} layers stay "
            "dense"
        )

    def measure(self) -> dict[str, Moments]:
        """The images for rule and repair, and what the repair will restore."""
        s = self.settings
        self.rule, self.repairs = rule(s.allocate), s.repair != "none"
        if self.rule.needs_images or self.repairs:
            self.images = draw(self.data.train, s.samples, s.seed)
        else:
            self.images = example(self.source)
        return moments(self.model, self.layers, self.images) if self.repairs else {}

    def decide(self) -> Budget:
        """Weights kept in each layer."""
        net = Net(self.model, self.layers, self.images, self.settings.batch_size)
        return self.rule.allocate(net, self.keep)

    def cut(self, budget: Budget) -> None:
        """Set the others to zero, in place."""
        keep_largest(self.model, budget.kept)
        assert sum(zeros(self.model, self.layers).values()) == self.total - self.keep

    def repair(self, dense: dict[str, Moments]) -> dict[str, str]:
        """Give every channel its mean and variance back, in place; where each shift went."""
        if not self.repairs:
            return {}
        strength = self.settings.strength
        return match_variance(self.model, dense, self.layers, self.images, shrinkage=strength)

    def evaluate(self) -> float:
        """Top-1 accuracy on the images for testing."""
        return top1(self.model, self.data.test, self.settings.batch_size)

    def compare(
        self, top: dict[str, float], budget: Budget, shifts: dict[str, str]
    ) -> dict[str, Any]:
        """What the dense and the sparse model are: `result.json`."""
        empty, facts = zeros(self.model, self.layers), dict(budget.explanation)
        scores = facts.pop("layers", {})
        return {
            "settings": self.settings.plain(),
            "top1": top,
            "sparsity": {
                "weights": self.total,
                "zeros": sum(empty.values()),
                "parameters": sum(p.numel() for p in self.model.parameters()),
            },
            "layers": layer_table(self.layers, empty, shifts, scores),
            "explanation": facts,
            "left_dense": self.dense,
            "seconds": time.perf_counter() - self.started,
        }

    def write(self) -> None:
        """The checkpoint, under the temporary name."""
        save_pruned(self.model, self.source, self.source.history, fresh(self.folder))

    def write_report(self, result: dict[str, Any]) -> None:
        """What was measured, as JSON and as a page."""
        notes = fresh(self.folder / FOLDER)
        (notes / "result.json").write_text(json.dumps(result, indent=1) + "\n")
        write_document(document(result), notes / "report.html")

    def verify(self) -> None:
        """Check the whole result, built anew by the code that this run was started with."""
        verify_result(self.folder, self.say, trust_remote_code=True)

    def finish(self, output: Path) -> None:
        """Give the result its name."""
        name_result(self.place, output)
