"""Gemma 4: router and experts lie in the decoder layer itself, beside a dense MLP.

The router carries no count of experts, and a scale per expert that is part of its weights.
"""

from __future__ import annotations

from typing import Any

from torch import nn

from moe_fair.moe.blocks import Axis, MoeBlock, layer_index

blocks = ("Gemma4TextDecoderLayer",)


def view(name: str, block: nn.Module) -> MoeBlock | None:
    """The view of a decoder layer; None for one without experts."""
    layer: Any = block
    if not layer.enable_moe_block:
        return None
    router = layer.router
    return MoeBlock(
        name=name,
        layer=layer_index(name),
        block=block,
        experts=layer.experts,
        router=router,
        routed=(Axis(router.proj, "weight", 0), Axis(router, "per_expert_scale", 0)),
        top_k=router.config.top_k_experts,
    )
