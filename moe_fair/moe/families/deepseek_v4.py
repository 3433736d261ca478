"""DeepSeek V4: the first MoE layers look their experts up by token id and stay whole.

Such a layer (`hash_moe`) has no score by which tokens of a removed expert could go elsewhere: a
table says who serves which token.
"""

from __future__ import annotations

from torch import nn

from moe_fair.moe.blocks import MoeBlock, standard_block

blocks = ("DeepseekV4SparseMoeBlock",)


def view(name: str, block: nn.Module) -> MoeBlock | None:
    """The standard view of a layer that chooses by score, None for one with a table."""
    return None if block.is_hash else standard_block(name, block)
