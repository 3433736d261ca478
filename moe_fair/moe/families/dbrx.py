"""DBRX: all experts in one 2-D matrix [E·F, D], and the block turns the router's logits to weights.

Shape legend: T tokens, E experts, K top-k, D model, F hidden.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor, nn

from moe_fair.moe.blocks import Axis, Forward, MoeBlock, layer_index

blocks = ("DbrxFFN",)


def view(name: str, block: nn.Module) -> MoeBlock:
    """The view of a `DbrxFFN`."""
    ffn: Any = block
    return DbrxBlock(
        name=name,
        layer=layer_index(name),
        block=block,
        experts=ffn.experts,
        router=ffn.router,
        routed=(Axis(ffn.router.layer, "weight", 0),),
        top_k=ffn.top_k,
    )


class DbrxBlock(MoeBlock):
    """A block whose experts are given hidden states [B, L, D] of sequences."""

    def chosen(self, output: Any) -> tuple[Tensor, Tensor]:
        """By the block's own rule from the logits."""
        block: Any = self.block
        weights, ids = block.route_tokens_to_experts(output)
        return ids, weights

    def attach(self, forward: Forward) -> tuple[Forward, Callable[[], None]]:
        """Put `forward` in the place of the experts; it is given tokens [T, D]."""

        def experts(hidden: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
            return forward(hidden.flatten(0, -2), ids, weights).view_as(hidden)

        stock, detach = super().attach(experts)
        return lambda x, ids, weights: stock(x, ids, weights).view_as(x), detach

    def matrices(self) -> list[Tensor]:
        """w1, v1 and w2, [E, F, D] each."""
        return [p.unflatten(0, (self.num_experts, -1)) for p in self.experts.parameters()]
