"""A statistic, and what a family of them sees: one batch as it passes the experts of one block.

Shape legend: B sequences, L tokens each, T = B·L, K top-k, S = T·K (token, slot) rows, E experts,
D model, P directions of a sketch.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal, Protocol

import torch
from torch import Tensor

from moe_fair.engines.batch import Batch
from moe_fair.moe.blocks import MoeBlock
from moe_fair.moe.segments import sequence_sums, sums


@dataclass(frozen=True)
class Statistic:
    """One of the numbers that criteria ask for by name.

    Attributes:
        shape: in letters of the legend: "E", "E D", "E E"; "B E" for rows, "S P" for a sketch.
        about: its formula, with the source where it is another's.
        needs_backward: it is known once the gradient of the loss is.
        kind: what becomes of a batch's share. A `sum` is added up per calibration domain, in
            float64; `row`: one of each sequence is kept; `sketch`: distributions (`core.sketch`);
            `constant`: of the weights, found once; `measured`: by runs of their own, not here.
    """

    shape: str
    about: str
    needs_backward: bool = False
    kind: Literal["sum", "row", "sketch", "constant", "measured"] = "sum"


class Family(Protocol):
    """What a module of statistics offers.

    Attributes:
        name: of the family.
        names: the statistics.

    Beside these it has functions, those that it needs:
        accumulate(seen) -> {name: Tensor}: a batch's share of what needs no gradient.
        backward(seen) -> {name: Tensor}: of the rest, once `seen.gradient` is there.
        output_gradient(seen, gradient): dL/dy [T, D], before `backward`.
        constants(block) -> {name: Tensor}: of the weights.
        watch(block): what stands beside the block while the model runs, with `attach` and `detach`;
            `seen.watched` holds it under the family's name.
    and, where it is collected unasked, `collected`: "always", or "usual" for what `calibrate` does.
    """

    name: str
    names: Mapping[str, Statistic]


class Pass:
    """One batch at one block.

    Nothing here may wait for a device once an expert (`.item()`, `.tolist()`, boolean indexing,
    `bincount`): `per_expert`, `per_sequence` and `moe.segments` do not.

    Attributes:
        block, batch: which; the batch lies on the block's device.
        backward: a backward follows.
        index, weights: [T, K] the experts of each token and their weights, as the model has them.
        x, y: [T, D] input and routed output of the experts; f: [S, D] the outputs f_e(x) of each
            row. The three are there in `accumulate` only.
        ids, g: [S] expert and weight of each row, the latter in float64.
        token: [S] of each row.
        counted: [S] float64, 1 for rows of real tokens and 0 for padding; None: nothing is padded.
        outputs: f_e(x) [R, D] for rows [R, D], experts [R] and weights [R].
        gradient: [T, K] dL/d(weight), in `backward`.
        watched: what families have put beside the block, by their name.
        kept: for families to keep what they need from `accumulate` to `backward`.
    """

    x: Tensor
    y: Tensor
    f: Tensor
    gradient: Tensor

    def __init__(
        self,
        block: MoeBlock,
        batch: Batch,
        index: Tensor,
        weights: Tensor,
        *,
        backward: bool,
        outputs: Callable[[Tensor, Tensor, Tensor], Tensor],
        watched: Mapping[str, Any],
    ) -> None:
        self.block, self.batch, self.backward = block, batch, backward
        self.index, self.weights, self.outputs, self.watched = index, weights, outputs, watched
        self.ids, self.g = index.flatten(), weights.flatten().double()
        self.size = block.num_experts
        self.kept: dict[str, Any] = {}
        tokens, k = index.shape
        self.token = torch.arange(tokens, device=index.device).repeat_interleave(k)
        self.counted = batch.mask.flatten()[self.token].double() if batch.padded else None

    @property
    def precise(self) -> torch.dtype:
        """Of the outputs, float32 at least."""
        return torch.promote_types(self.f.dtype, torch.float32)

    def per_expert(self, values: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """[S] -> [E] sums over counted rows, of each."""
        stacked = torch.stack(list(values.values()))
        if self.counted is not None:
            stacked = stacked * self.counted
        return dict(zip(values, sums(stacked, self.index, self.size), strict=True))

    def per_sequence(self, values: Tensor) -> Tensor:
        """[S] -> [B, E] sums over counted rows."""
        if self.counted is not None:
            values = values * self.counted
        return sequence_sums(values, self.index, self.size, self.batch.mask.shape[1])

    def over_tokens(self, values: Tensor) -> Tensor:
        """[T, E] -> [E] sums over real tokens, float64."""
        if self.counted is not None:
            return self.batch.mask.flatten().to(values) @ values
        return values.sum(0)


def check_shape(
    family: str, name: str, value: Tensor, known: Statistic | None, sizes: Mapping[str, int]
) -> None:
    """A batch's share is what its family declares.

    Args:
        known: the statistic of this name, if it is collected.
        sizes: of the letters; D is not one number, as experts may work in a narrower space.

    Raises:
        ValueError: it is not.
    """
    shape = known.shape.split() if known is not None else []
    fits = len(shape) == value.dim() and all(
        sizes.get(letter, n) == n for letter, n in zip(shape, value.shape, strict=True)
    )
    if known is None or not fits:
        raise ValueError(
            f"the statistics {family!r} give {name} {list(value.shape)} for {sizes['E']} experts, "
            f"and declare {' × '.join(shape) or 'none'}"
        )
