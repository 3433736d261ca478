"""Cutting experts out of a checkpoint's files, byte range by byte range. No model is built.

What a stored tensor is follows from where transformers' own loading puts it:
- one expert's tensor (`...experts.7.up_proj.weight`): kept under its new number, or dropped;
- a fused tensor or a router tensor with an expert axis: its rows are taken;
- a tensor unknown to the model that lies beside an expert's (quantisation scales): goes with it;
- everything else, unknown tensors included: copied as it is.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch

from moe_fair.engines.shards import StoredTensor
from moe_fair.moe.blocks import MoeBlock, rows_of

LAST_NUMBER = re.compile(r"^(.*\.)(\d+)(\..+)$")


@dataclass(frozen=True)
class ExpertTensor:
    """A stored tensor that changes with its block.

    Attributes:
        block: the block's name.
        expert: whose tensor this is, or None for a tensor with an axis of all of them.
        dim: that axis.
        experts: how many experts lie along it.
    """

    block: str
    expert: int | None
    dim: int
    experts: int


def classify(
    tensors: Sequence[StoredTensor], names: Mapping[str, str], blocks: Sequence[MoeBlock]
) -> dict[str, ExpertTensor]:
    """Stored name -> what it is, for the tensors that a cut changes.

    Args:
        tensors: all tensors of the checkpoint.
        names: stored name -> name in the model.
        blocks: the MoE blocks of the skeleton.

    Raises:
        ValueError: an expert's tensor whose layout is unknown, or a block of which not every expert
            was found.
    """
    experts, routed = _model_tensors(blocks)
    found: dict[str, ExpertTensor] = {}
    prefixes: dict[str, MoeBlock] = {}
    fused: dict[str, MoeBlock] = {}
    for t in tensors:
        target = names[t.name]
        if target in routed:
            block, shape, dim = routed[target]
            dim = _stored_axis(t, shape, dim)
            found[t.name] = ExpertTensor(block.name, None, dim, block.num_experts)
        elif target in experts:
            block, shape = experts[target]
            if len(t.shape) >= len(shape):  # codes may have an axis more
                _check_axis(t, shape[0])
                found[t.name] = ExpertTensor(block.name, None, 0, block.num_experts)
                fused[t.name.rpartition(".")[0] + "."] = block
            else:
                prefix, number = _expert_number(t)
                prefixes[prefix] = block
                found[t.name] = ExpertTensor(block.name, number, 0, block.num_experts)
    for t in tensors:
        if t.name not in found:
            companion = _companion(t, prefixes, fused)
            if companion:
                found[t.name] = companion
    _check_complete(found, {b.name for b in fused.values()}, blocks)
    return found


def cut_tensors(
    tensors: Sequence[StoredTensor],
    what: Mapping[str, ExpertTensor],
    kept: Mapping[str, Sequence[int]],
) -> Iterator[StoredTensor]:
    """The tensors of the pruned checkpoint, in the order of the originals.

    Args:
        what: from `classify`.
        kept: block name -> ids that stay, rising. Blocks that are not named stay whole.
    """
    place = {block: {e: i for i, e in enumerate(ids)} for block, ids in kept.items()}
    for t in tensors:
        part = what.get(t.name)
        if part is None or part.block not in kept:
            yield t
        elif part.expert is None:
            rows = rows_of(kept[part.block], t.shape[part.dim], part.experts)
            yield t.take(rows, part.dim)
        elif part.expert in place[part.block]:
            number = place[part.block][part.expert]
            yield t.renamed(LAST_NUMBER.sub(rf"\g<1>{number}\g<3>", t.name))


def unit_sizes(
    tensors: Sequence[StoredTensor],
    what: Mapping[str, ExpertTensor],
    weights: Callable[[StoredTensor], int] | None = None,
) -> dict[str, tuple[int, int]]:
    """Block name -> (parameters, bytes) on disk that leave with one expert, on average.

    Args:
        what: from `classify`.
        weights: how many a stored tensor stands for, where they are packed.
    """
    totals: dict[str, tuple[int, int]] = {}
    for t in tensors:
        part = what.get(t.name)
        if part is None:
            continue
        experts, length = part.experts, 1 if part.expert is not None else t.shape[part.dim]
        share = 1 if part.expert is not None else length // experts * experts
        numel, size = totals.get(part.block, (0, 0))
        totals[part.block] = (
            numel + (weights(t) if weights else t.numel) // length * share,
            size + t.bytes // length * share,
        )
    experts_of = {p.block: p.experts for p in what.values()}
    return {b: (n // experts_of[b], s // experts_of[b]) for b, (n, s) in totals.items()}


def _model_tensors(
    blocks: Sequence[MoeBlock],
) -> tuple[dict[str, tuple[MoeBlock, torch.Size]], dict[str, tuple[MoeBlock, torch.Size, int]]]:
    """Model names of expert tensors -> (block, shape), of router tensors -> with axis as well."""
    experts, routed = {}, {}
    for b in blocks:
        paths = {id(m): f"{b.name}.{n}" if n else b.name for n, m in b.block.named_modules()}
        for module, tensor, dim in b.tensors():
            name = f"{paths[id(module)]}.{tensor}"
            shape = getattr(module, tensor).shape
            if (module, tensor, dim) in b.routed:
                routed[name] = (b, shape, dim)
            else:
                experts[name] = (b, shape)
    return experts, routed


def _stored_axis(t: StoredTensor, shape: torch.Size, dim: int) -> int:
    """The axis of the experts in a stored router tensor, which some families transpose on load."""
    if tuple(t.shape) == tuple(shape):
        return dim
    if len(shape) == 2 and tuple(t.shape) == tuple(shape[::-1]):
        return 1 - dim
    raise ValueError(
        f"{t.name} {list(t.shape)}: expected the router's {list(shape)}; this layout is not "
        "supported"
    )


def _check_axis(t: StoredTensor, length: int) -> None:
    if not t.shape or t.shape[0] != length:
        raise ValueError(
            f"{t.name} {list(t.shape)}: expected {length} on its first axis; this packing of "
            "experts is not supported"
        )


def _expert_number(t: StoredTensor) -> tuple[str, int]:
    match = LAST_NUMBER.match(t.name)
    if match is None:
        raise ValueError(f"{t.name}: belongs to one expert, but its name has no number")
    return match[1] + match[2] + ".", int(match[2])


def _companion(
    t: StoredTensor, prefixes: Mapping[str, MoeBlock], fused: Mapping[str, MoeBlock]
) -> ExpertTensor | None:
    """A tensor that the model does not know beside an expert's: scales of a quantised matrix."""
    match = LAST_NUMBER.match(t.name)
    if match and (owner := prefixes.get(match[1] + match[2] + ".")):
        return ExpertTensor(owner.name, int(match[2]), 0, owner.num_experts)
    for prefix, block in fused.items():
        if t.name.startswith(prefix):
            _check_axis(t, block.num_experts)
            return ExpertTensor(block.name, None, 0, block.num_experts)
    return None


def _check_complete(
    found: Mapping[str, ExpertTensor], fused: set[str], blocks: Sequence[MoeBlock]
) -> None:
    for b in blocks:
        parts = [p for p in found.values() if p.block == b.name]
        numbers = {p.expert for p in parts if p.expert is not None}
        if numbers and numbers != set(range(b.num_experts)):
            raise ValueError(
                f"{b.name}: the checkpoint has {len(numbers)} numbered experts where the block has "
                f"{b.num_experts}; whose the others are is unknown"
            )
        if not numbers and b.name not in fused:
            raise ValueError(
                f"{b.name}: none of its experts' tensors was found in the checkpoint under a name "
                "that transformers knows"
            )
