"""Cutting experts out of a loaded model."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import nn

from moe_fair.moe.blocks import MoeBlock, find_blocks, rows_of
from moe_fair.moe.token_table import remapped


def check_kept(block: MoeBlock, kept: Sequence[int]) -> None:
    """The block can route among these experts.

    Raises:
        ValueError: ids out of range or repeated, too few of them, or unequal groups.
    """
    size = block.num_experts
    if sorted(set(kept)) != list(kept) or not kept or kept[0] < 0 or kept[-1] >= size:
        raise ValueError(f"{block.name}: kept ids must rise within 0..{size - 1}")
    if len(kept) < block.top_k:
        raise ValueError(
            f"{block.name}: {len(kept)} experts kept, but the router picks top {block.top_k}"
        )
    if block.n_group > 1:
        run = size // block.n_group
        counts = [sum(1 for e in kept if e // run == i) for i in range(block.n_group)]
        if len(set(counts)) > 1:
            raise ValueError(
                f"{block.name}: group-limited routing needs equal counts in its {block.n_group} "
                f"groups, got {counts}"
            )
        if len(kept) < block.floor():
            raise ValueError(
                f"{block.name}: {counts[0]} experts kept in each of {block.n_group} groups, but "
                f"the router picks top {block.top_k} from the {block.topk_group} groups with the "
                f"best two; keep {block.floor() // block.n_group} in each"
            )


def cut(model: nn.Module, kept: Mapping[str, Sequence[int]]) -> None:
    """Keep only these experts, in place: fused matrices, router rows, biases, tables, counts.

    Args:
        kept: block name -> ids that stay, rising. Blocks that are not named stay whole.

    Raises:
        ValueError: an unknown block, or ids that routing cannot work with. Nothing is cut then.
    """
    found = find_blocks(model)
    check_all(found, kept)
    blocks = {b.name: b for b in found}
    for name, ids in kept.items():
        cut_block(blocks[name], ids)


def check_all(found: Sequence[MoeBlock], kept: Mapping[str, Sequence[int]]) -> None:
    """The model has these blocks, and they can route among the ids.

    Raises:
        ValueError: an unknown block, or see `check_kept`.
    """
    blocks = {b.name: b for b in found}
    unknown = set(kept) - set(blocks)
    if unknown:
        raise ValueError(
            f"the plan names {sorted(unknown)[0]}, which this model does not have; it was made "
            "for another model"
        )
    for name, ids in kept.items():
        check_kept(blocks[name], ids)


def cut_block(block: MoeBlock, ids: Sequence[int]) -> None:
    """Keep only these experts of one block, in place; `check_kept` says whether it can."""
    size = block.num_experts
    tensors, numbers = list(block.tensors()), list(block.numbers())
    if block.table is not None:  # by the router's rows, as long as all are there
        module, name, rows = block.table
        setattr(module, name, remapped(getattr(module, name), ids, getattr(module, rows)))
    for module, name, dim in tensors:
        t = getattr(module, name)
        stay = torch.tensor(rows_of(ids, t.shape[dim], size), device=t.device)
        sliced = t.detach().index_select(dim, stay)
        if name in module._parameters:
            sliced = nn.Parameter(sliced, t.requires_grad)
        setattr(module, name, sliced)
    for module, attribute in numbers:
        setattr(module, attribute, len(ids))
