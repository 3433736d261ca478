"""DeepSeek V4: the first MoE layers, `hash_moe`, look their experts up by token id.

Such a layer has no score by which tokens of a removed expert would go elsewhere: a table says who
serves which token, and the router's weight only how strongly. It stays whole unless the config says
otherwise; then the table names substitutes for what is removed (see `token_table`).
"""

from __future__ import annotations

from typing import Any

from torch import nn

from moe_fair.moe.blocks import HASH_LAYERS, Axis, MoeBlock, TokenTable, layer_index, standard_block

blocks = ("DeepseekV4SparseMoeBlock",)


def view(name: str, block: nn.Module) -> MoeBlock | None:
    """The standard view of a layer that chooses by score; of one with a table only where asked."""
    layer: Any = block
    if not layer.is_hash:
        return standard_block(name, block)
    if getattr(layer.experts.config, HASH_LAYERS, "keep") != "cut":
        return None
    return MoeBlock(
        name=name,
        layer=layer_index(name),
        block=block,
        experts=layer.experts,
        router=layer.gate,
        routed=(Axis(layer.gate, "weight", 0),),
        top_k=layer.gate.top_k,
        table=TokenTable(layer.gate, "tid2eid", "weight"),
    )
