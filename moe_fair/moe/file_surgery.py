"""Cutting experts out of a checkpoint's files, byte range by byte range. No model is built.

What a stored tensor is follows from where transformers' own loading puts it:
- one expert's tensor (`...experts.7.up_proj.weight`): kept under its new number, or dropped;
- a fused tensor or a router tensor with an expert axis: its rows are taken;
- a tensor unknown to the model that lies beside an expert's (quantisation scales): goes with it;
- everything else, unknown tensors included: copied as it is.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from moe_fair.engines.shards import StoredTensor
from moe_fair.moe.blocks import MoeBlock

LAST_NUMBER = re.compile(r"^(.*\.)(\d+)(\..+)$")


@dataclass(frozen=True)
class ExpertTensor:
    """A stored tensor that changes with its block: which block, and which expert or axis of it."""

    block: str
    expert: int | None
    dim: int


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
    prefixes: dict[str, tuple[str, int]] = {}
    fused: dict[str, MoeBlock] = {}
    for t in tensors:
        target = names[t.name]
        if target in routed:
            block, dim = routed[target]
            found[t.name] = ExpertTensor(block, None, dim)
        elif target in experts:
            block_view, dims = experts[target]
            if len(t.shape) == dims:
                _check_axis(t, block_view)
                found[t.name] = ExpertTensor(block_view.name, None, 0)
                fused[t.name.rpartition(".")[0] + "."] = block_view
            else:
                prefix, number = _expert_number(t)
                prefixes[prefix] = (block_view.name, number)
                found[t.name] = ExpertTensor(block_view.name, number, 0)
    for t in tensors:
        if t.name not in found:
            companion = _companion(t, prefixes, fused)
            if companion:
                found[t.name] = companion
    _check_complete(found, blocks)
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
            yield t.take(kept[part.block], part.dim)
        elif part.expert in place[part.block]:
            number = place[part.block][part.expert]
            yield t.renamed(LAST_NUMBER.sub(rf"\g<1>{number}\g<3>", t.name))


def _model_tensors(
    blocks: Sequence[MoeBlock],
) -> tuple[dict[str, tuple[MoeBlock, int]], dict[str, tuple[str, int]]]:
    """Model names of expert tensors -> (block, dimensions), of router tensors -> (block, axis)."""
    experts, routed = {}, {}
    for b in blocks:
        inside = {id(m): n for n, m in b.block.named_modules()}
        base = f"{b.name}.{inside[id(b.experts)]}."
        for name, p in b.experts.named_parameters():
            experts[base + name] = (b, p.dim())
        for module, tensor, dim in b.routed:
            path = ".".join(x for x in (b.name, inside[id(module)], tensor) if x)
            routed[path] = (b.name, dim)
    return experts, routed


def _check_axis(t: StoredTensor, block: MoeBlock) -> None:
    if t.shape[0] != block.num_experts:
        raise ValueError(
            f"{t.name} {list(t.shape)}: expected {block.num_experts} experts on its first axis; "
            "this packing of experts is not supported"
        )


def _expert_number(t: StoredTensor) -> tuple[str, int]:
    match = LAST_NUMBER.match(t.name)
    if match is None:
        raise ValueError(f"{t.name}: belongs to one expert, but its name has no number")
    return match[1] + match[2] + ".", int(match[2])


def _companion(
    t: StoredTensor, prefixes: Mapping[str, tuple[str, int]], fused: Mapping[str, MoeBlock]
) -> ExpertTensor | None:
    """A tensor that the model does not know beside an expert's: scales of a quantised matrix."""
    match = LAST_NUMBER.match(t.name)
    if match and (owner := prefixes.get(match[1] + match[2] + ".")):
        return ExpertTensor(owner[0], owner[1], 0)
    for prefix, block in fused.items():
        if t.name.startswith(prefix):
            _check_axis(t, block)
            return ExpertTensor(block.name, None, 0)
    return None


def _check_complete(found: Mapping[str, ExpertTensor], blocks: Sequence[MoeBlock]) -> None:
    for b in blocks:
        parts = [p for p in found.values() if p.block == b.name]
        numbers = {p.expert for p in parts if p.expert is not None}
        if numbers and numbers != set(range(b.num_experts)):
            raise ValueError(
                f"{b.name}: the checkpoint holds {len(numbers)} of its {b.num_experts} experts"
            )
        if not parts:
            raise ValueError(f"{b.name}: none of its tensors was found in the checkpoint")
