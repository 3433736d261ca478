"""A result whose weights are stored otherwise than the original's (--save-as), against it.

Nothing here asks how the result was written. Both are unpacked, and what an expert is under its new
number has to be near what it was: bitwise its rounding to bfloat16 where it is not packed, and by
less than half of its size where it is, which no other expert's weights would be.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from moe_fair.core.plan import Plan
from moe_fair.engines.packing.scheme import CODES
from moe_fair.engines.stored_values import read_tensor
from moe_fair.moe.tensor_slicing import LAST_NUMBER

if TYPE_CHECKING:  # imports transformers
    from moe_fair.engines.shards import StoredTensor
    from moe_fair.moe.checkpoint_source import Checkpoint

NEAR = 0.5  # of a packed matrix's size; FP8 is off by .03, INT4 by .1 to .2, another expert by 1.4


def check_packing(name: str, original: Checkpoint, config: Mapping[str, Any]) -> None:
    """A config says how weights are packed as readers of this form want it.

    Raises:
        ValueError: it does not.
    """
    from moe_fair.engines.packing import QUANTISED
    from moe_fair.moe.conversion import DTYPES, Conversion

    its = Conversion(original, name).target
    found = dict(config.get(QUANTISED[0]) or {})
    if its.scheme is not None and not isinstance(found.pop(its.plain, None), list):
        raise ValueError(f"config.json: quantization_config has no list of {its.plain}")
    if found != dict(its.settings):
        raise ValueError(f"config.json: quantization_config is not that of {name}")
    if any(config.get(n, "bfloat16") != "bfloat16" for n in DTYPES):
        raise ValueError("config.json: dtype is not bfloat16")


def check_experts(
    plan: Plan,
    original: Checkpoint,
    found: Checkpoint,
    changed: Collection[str],
    merged: Mapping[str, Collection[int]],
    tables: Mapping[str, Tensor],
) -> str:
    """Every weight of the result is near the original's.

    Args:
        changed: names in the model of what repairs changed.
        merged: name in the model -> experts that others were merged into.
        tables: name of a table of token ids -> what it now holds.

    Returns:
        what was found, in a line.

    Raises:
        ValueError: one is not; says which.
    """
    left = dict(_weights(found))
    dropped = {t.name for t in original.heads.tensors} if plan.mtp == "drop" else set()
    rounded = packed = others = 0
    for name, (codes, values) in _weights(original):
        if codes.name in dropped:
            continue
        part, place = original.parts.get(codes.name), original.find(name).name
        ids: list[int] | None = None
        if part is not None and part.block in plan.kept:
            ids = list(plan.kept[part.block])
        new = name
        if ids is not None and part is not None and part.expert is not None:
            if part.expert not in ids:
                continue
            new = LAST_NUMBER.sub(rf"\g<1>{ids.index(part.expert)}\g<3>", name)
        if new not in left:
            raise ValueError(f"{new} is missing")
        its, read = left.pop(new)
        joined = part is not None and (part.expert is None or part.expert in merged.get(place, ()))
        if place in changed or (place in merged and joined):
            others += 1
            continue
        if name in tables:
            wanted, got = tables[name], read()
        else:
            wanted, got = values(), read()
        if ids is not None and part is not None and part.expert is None and name not in tables:
            width, rest = divmod(wanted.shape[part.dim], part.experts)
            rows = [e * width + i for e in ids for i in range(width)]
            rows += range(width * part.experts, width * part.experts + rest)
            wanted = wanted.index_select(part.dim, torch.tensor(rows))
        if wanted.shape != got.shape:
            raise ValueError(f"{new} is {list(got.shape)}, expected {list(wanted.shape)}")
        if found.packing is not None and new in found.packing.weights:
            packed += 1
            if not float((got - wanted).norm()) <= NEAR * float(wanted.float().norm()):
                raise ValueError(f"{new} is far from the original's {name}")
            continue
        rounded += 1
        if not torch.equal(wanted.to(got.dtype), got):
            raise ValueError(f"{new} differs from the original's {name}")
        if got.dtype not in (wanted.dtype, torch.bfloat16):
            raise ValueError(f"{new} is {its.dtype}")
    if left:
        raise ValueError(f"{min(left)} is not in the original")
    text = f"{rounded} tensors are bitwise the original's, rounded where they are bfloat16 now"
    text += f"; {packed} packed ones are near it" if packed else ""
    return text + (f"; {others} were repaired or merged" if others else "")


def _weights(
    source: Checkpoint,
) -> Iterator[tuple[str, tuple[StoredTensor, Callable[[], Tensor]]]]:
    """(name, (stored codes, what reads it)) of every weight, unpacked."""
    packing = source.packing
    for w in packing.weights.values() if packing else ():

        def values(w: Any = w) -> Tensor:
            assert packing is not None
            return packing.scheme.unpack(w, {r: read_tensor(t) for r, t in w.parts.items()})

        yield w.name, (w.parts[CODES], values)
    for t in source.tensors:
        if packing is not None and (t.name in packing.owners or packing.weight_of(t.name) is None):
            continue
        yield t.name, (t, partial(read_tensor, t))
