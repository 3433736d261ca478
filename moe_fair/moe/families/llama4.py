"""Llama 4: the router weight multiplies an expert's input, and the stock code runs all on all.

`y(x) = Σ_{e∈topk} mlp_e(g_e x)` with `g = sigmoid(logit)`. What an expert adds is written as
`g_e f_e` with `f_e = mlp_e(g_e x) / g_e`, so that every statistic means what it means elsewhere:
the gate Taylor value stays `⟨∂L/∂y, what e adds⟩`. While it is watched only the routed experts run;
the stock code runs every expert on every token, with inputs of zero where it is not routed.

Shape legend: T tokens, E experts, K top-k, S (token, slot) rows, N most of one expert, D model.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from moe_fair.moe.blocks import Axis, Forward, MoeBlock, layer_index

blocks = ("Llama4TextMoe",)


def view(name: str, block: nn.Module) -> MoeBlock:
    """The view of a `Llama4TextMoe`."""
    router: Any = block.router
    return Llama4Block(
        name=name,
        layer=layer_index(name),
        block=block,
        experts=block.experts,  # type: ignore[arg-type]
        router=router,
        routed=(Axis(router, "weight", 0),),
        top_k=router.top_k,
    )


class Llama4Block(MoeBlock):
    """A block whose router gives sigmoid scores [T, E], zero where an expert is not chosen."""

    @property
    def transposed(self) -> bool:
        """The experts' matrices are kept [in, out]."""
        return True

    def chosen(self, output: Any) -> tuple[Tensor, Tensor]:
        """The K scores that are not zero, and whose they are."""
        weights, ids = output[0].topk(self.top_k, dim=1)
        return ids, weights

    def attach(self, forward: Forward) -> tuple[Forward, Callable[[], None]]:
        """Put `forward` in the place of the experts; it is given the input before the scores."""
        seen: list[tuple[Tensor, Tensor, Tensor]] = []

        def see(router: nn.Module, arguments: tuple[Tensor, ...], output: Any) -> None:
            seen.append((arguments[0], *self.chosen(output)))

        def experts(scaled: Tensor) -> Tensor:
            y = forward(*seen.pop())
            return torch.cat([y, y.new_zeros(len(scaled) - len(y), y.shape[1])])  # summed over E

        handle = self.router.register_forward_hook(see)
        stock, restore = super().attach(experts)  # type: ignore[arg-type]

        def detach() -> None:
            handle.remove()
            restore()

        return stock, detach

    def routed_output(self, stock: Forward, x: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
        """The stock experts take inputs that are scaled already: run by `outputs`, and summed."""
        rows = x.repeat_interleave(ids.shape[1], dim=0)
        f = self.outputs(stock, rows, ids.flatten(), weights.flatten())
        weighted = f * weights.flatten().unsqueeze(1)
        return weighted.view(*ids.shape, -1).sum(1).to(x.dtype)

    def outputs(self, stock: Forward, rows: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
        """mlp_e(g x) / g of every row, by the stock kernel on E equally long runs [E, N, D]."""
        counts = torch.bincount(ids, minlength=self.num_experts)
        order = torch.argsort(ids, stable=True)
        first = (counts.cumsum(0) - counts)[ids[order]]
        place = ids[order], torch.arange(len(ids), device=ids.device) - first
        g = weights.to(rows.dtype).unsqueeze(1)
        runs = rows.new_zeros(self.num_experts, int(counts.max()), rows.shape[1])
        runs = runs.index_put(place, (rows * g)[order])
        y = stock(runs.flatten(0, 1)).view_as(runs)[place]  # type: ignore[call-arg]
        y = torch.empty_like(y).index_copy(0, order, y)
        return y / g.masked_fill(g == 0, 1)
