"""The whole flow: a rule's counts per layer -> zeros -> repair -> checkpoint."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from moe_fair.core.interrupts import closing
from moe_fair.core.manifest import write_manifest
from moe_fair.core.output import Place, claim, fresh, settle
from moe_fair.pipelines.vision import FOLDER, open_inputs
from moe_fair.report.sparse import document
from moe_fair.report.write import write_document
from moe_fair.vision.accuracy import top1
from moe_fair.vision.checkpoint import save_pruned
from moe_fair.vision.data import ImageSet
from moe_fair.vision.load import example
from moe_fair.vision.sparse.fill import check_total
from moe_fair.vision.sparse.layers import Net, find_layers, keep_largest, zeros
from moe_fair.vision.sparse.repair import match_variance, moments
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
def sparsify(
    settings: SparseSettings, output: Path, *, say: Callable[[str], None] = lambda _: None
) -> Sparse:
    """An image classifier with so many of its weights at zero in `output`.

    Raises:
        ValueError: bad input, or a sparsity that cannot be met.
    """
    output = Path(output)  # text will do
    with claim(output) as place:
        return _sparsify(settings, output, place, say)


def _sparsify(
    settings: SparseSettings, output: Path, place: Place, say: Callable[[str], None]
) -> Sparse:
    started = time.perf_counter()
    source, data = open_inputs(settings)
    model = source.model
    layers, dense = find_layers(model, example(source))
    total = sum(x.size for x in layers)
    keep = total - round(settings.sparsity * total)
    check_total(layers, keep)
    say(f"{total:,} weights in {len(layers)} layers; {len(dense)} layers stay dense")
    chosen, repairs = rule(settings.allocate), settings.repair != "none"
    if chosen.needs_images or repairs:
        images = draw(data.train, settings.samples, settings.seed)
    else:
        images = example(source)
    top = {"dense": top1(model, data.test, settings.batch_size)}
    say(f"top-1 of the dense model: {top['dense']:.2%} on {len(data.test):,} images")

    budget = chosen.allocate(Net(model, layers, images, settings.batch_size), keep)
    wanted = moments(model, layers, images) if repairs else {}
    keep_largest(model, budget.kept)
    assert sum(zeros(model, layers).values()) == total - keep
    top["pruned"] = top1(model, data.test, settings.batch_size)
    say(f"top-1 with {settings.sparsity:.2%} of the weights at zero: {top['pruned']:.2%}")
    shifts: dict[str, str] = {}
    if repairs:
        shifts = match_variance(model, wanted, layers, images, shrinkage=settings.strength)
    top["final"] = top1(model, data.test, settings.batch_size)

    empty, facts = zeros(model, layers), dict(budget.explanation)
    scores = facts.pop("layers", {})
    result = {
        "settings": settings.plain(),
        "top1": top,
        "sparsity": {
            "weights": total,
            "zeros": sum(empty.values()),
            "parameters": sum(p.numel() for p in model.parameters()),
        },
        "layers": [
            {
                "name": x.name,
                "shape": list(x.shape),
                "weights": x.size,
                "kept": x.size - empty[x.name],
                "sparsity": empty[x.name] / x.size,
                **({"shift": shifts[x.name]} if shifts else {}),
                **scores.get(x.name, {}),
            }
            for x in layers
        ],
        "explanation": facts,
        "left_dense": dense,
        "seconds": time.perf_counter() - started,
    }
    folder = fresh(place.partial)
    save_pruned(model, source, source.history, folder)
    (folder / FOLDER).mkdir()
    (folder / FOLDER / "result.json").write_text(json.dumps(result, indent=1) + "\n")
    write_document(document(result), folder / FOLDER / "report.html")
    write_manifest(folder)
    with closing(output):
        settle(folder, place.path)
    return Sparse(output, result)


def draw(images: ImageSet, count: int, seed: int) -> Tensor:
    """[S, C, H, W] images for calibration, drawn without a look at their labels."""
    ids = np.random.default_rng(seed).permutation(len(images))[:count]
    return images.part(sorted(ids.tolist())).tensors()[0]
