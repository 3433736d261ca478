"""Whether a pruned image classifier is what its plans or its result say."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch

from moe_fair.core.manifest import FOLDER
from moe_fair.core.plan import Plan
from moe_fair.vision.checkpoint import open_pruned, read_record
from moe_fair.vision.load import is_known


def plans_of(output: Path) -> list[Plan]:
    """The plan of every step, in order.

    Raises:
        ValueError: there is none, or one cannot be read.
    """
    folder = output / FOLDER
    if not (folder / "plan-1.json").is_file():
        return [Plan.load(folder / "plan.json")]
    count = len(list(folder.glob("plan-*.json")))
    return [Plan.load(folder / f"plan-{i}.json") for i in range(1, count + 1)]


def zeros_of(output: Path) -> dict[str, Any] | None:
    """What `sparsify` says of its zeros; None where units were cut instead."""
    file = output / FOLDER / "result.json"
    try:
        found = json.loads(file.read_text()) if file.is_file() else {}
    except ValueError:
        return None  # damaged, as its hash says
    return found if isinstance(found, dict) and "sparsity" in found else None


def check_cuts(output: Path) -> str:
    """The recorded cuts take out of every group's first layer what its plan removes.

    Returns:
        what was found, in a line.

    Raises:
        ValueError: the first thing that is wrong.
    """
    plans, history = plans_of(output), read_record(output)["history"]
    if len(history) < len(plans):
        raise ValueError(f"{len(plans)} plans and {len(history)} steps of cuts")
    gone = 0
    # steps before these belong to the pruned model that this one was made from
    for step, (plan, cuts) in enumerate(zip(plans, history[-len(plans) :], strict=True), 1):
        made = {(module, side): len(ids) for module, side, ids in cuts}
        for g in plan.groups:
            count = made.get((g.name, "out"), 0)
            # an attention head is one unit of several positions
            if (count == 0) != (g.depth == 0) or (g.depth and count % g.depth):
                wrong = f"{g.name}: the plan of step {step} removes {g.depth} units"
                raise ValueError(f"{wrong} and its cuts {count}")
            gone += g.depth
    return f"{gone} units in {len(plans)} step{'s' * (len(plans) > 1)}, as planned"


def can_build(output: Path) -> bool:
    """The model's code is transformers' or of a library that is called unasked."""
    return is_known(read_record(output)["base"])


def check_model(output: Path, *, trust_remote_code: bool = False) -> str:
    """The base, cut, takes the weights, has the planned size, and every weight is finite.

    Returns, raises: as `check_cuts`.
    """
    model = open_pruned(output, trust_remote_code=trust_remote_code).model
    found, sparse = sum(p.numel() for p in model.parameters()), zeros_of(output)
    if sparse is None:
        planned = plans_of(output)[-1].after.parameters
    else:
        planned = sparse["sparsity"]["parameters"]
        modules = dict(model.named_modules())
        for layer in sparse["layers"]:
            weight = modules[layer["name"]].weight
            assert isinstance(weight, torch.Tensor)
            if (kept := int(weight.count_nonzero())) != layer["kept"]:
                raise ValueError(
                    f"{layer['name']}: {kept:,} weights are left, not {layer['kept']:,}"
                )
    if found != planned:
        raise ValueError(f"{found:,} parameters, planned {planned:,}")
    check_finite(model)
    return f"{found:,} parameters, as planned, all finite"


def check_finite(model: torch.nn.Module) -> None:
    """Every weight is finite; a buffer may be a mask of infinities.

    Raises:
        ValueError: one is not.
    """
    for name, p in model.named_parameters():
        if not bool(p.isfinite().all()):
            raise ValueError(f"{name} holds values that are not finite")
    for name, b in model.named_buffers():
        if bool(b.isnan().any()):
            raise ValueError(f"{name} holds NaN")
