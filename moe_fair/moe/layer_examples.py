"""What a layer is trained on: what goes in, what is wanted out, and who judges instead of teaching.

Shape legend: B sequences, L tokens, N tokens that are kept, D model.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.func import functional_call

from moe_fair.engines.batch import Batch
from moe_fair.engines.streaming import LayerCall
from moe_fair.moe.layer_split import LayerSplit


class Examples(Protocol):
    """Batches of them.

    Attributes:
        module: whose parameters take part.
        teaching, judging: the batches that have tokens of a kind.
        unit: what the original layer changes in a token's residual stream, squared, on average.
        size: the same of all tokens that judge together.
    """

    module: nn.Module
    teaching: list[int]
    judging: list[int]
    unit: float
    size: float

    def error(self, j: int, weights: Mapping[str, Tensor], *, judging: bool) -> tuple[Tensor, int]:
        """Squared error of a batch's tokens of a kind with these weights; how many they are."""
        ...


class _Kinds:
    """Masks [B, L] of the tokens that teach and judge, and how many there are."""

    def __init__(self, batches: Sequence[Batch], held: Callable[[Batch], Tensor]) -> None:
        self.masks: dict[bool, list[Tensor]] = {False: [], True: []}
        self.counts: dict[bool, list[int]] = {False: [], True: []}
        for b in batches:
            real, judge = b.mask.bool(), held(b).unsqueeze(1)
            for judging, its in ((False, ~judge), (True, judge)):
                self.masks[judging].append(real & its)
        for judging, masks in self.masks.items():  # one wait for all of them
            sums = torch.stack([m.sum() for m in masks]) if masks else torch.zeros(0)
            self.counts[judging] = sums.tolist()
        self.teaching, self.judging = (
            [j for j, n in enumerate(self.counts[k]) if n] for k in (False, True)
        )


class LayerExamples:
    """A whole layer's: [B, L, D] hidden states into the pruned layer, and wanted out of it.

    Args:
        layer, block: the layer, and the part of it that learns.
        calls, batches: what the model hands to the layer with each batch.
        held: batch -> [B] which sequences judge instead of teach.
    """

    def __init__(
        self,
        layer: nn.Module,
        calls: Sequence[LayerCall],
        batches: Sequence[Batch],
        inputs: Sequence[Tensor],
        targets: Sequence[Tensor],
        held: Callable[[Batch], Tensor],
    ) -> None:
        self.module, self.calls = layer, calls
        self.inputs, self.targets = inputs, targets
        self.kinds = _Kinds(batches, held)
        self.teaching, self.judging = self.kinds.teaching, self.kinds.judging
        work = {k: self._change(k) for k in (False, True)}
        self.unit = work[False] / max(1, sum(self.kinds.counts[False]))
        self.size = work[True]

    def error(self, j: int, weights: Mapping[str, Tensor], *, judging: bool) -> tuple[Tensor, int]:
        """Squared error of a batch's tokens of a kind with these weights; how many they are."""

        def forward(*arguments: Any, **keywords: Any) -> Any:
            return functional_call(self.module, dict(weights), arguments, keywords)

        out = self.calls[j].run(forward, self.inputs[j])
        mask = self.kinds.masks[judging][j]
        return _squares(self.targets[j], out, mask), self.kinds.counts[judging][j]

    def _change(self, judging: bool) -> float:
        pairs = zip(self.targets, self.inputs, self.kinds.masks[judging], strict=True)
        return float(sum(_squares(t, x, m).double() for t, x, m in pairs))


class BlockExamples:
    """A block's alone, where the layer's output is the sum of what it gives and of a rest.

    Tokens of a kind are put together: what only judges is not computed while teaching.

    Args:
        given, rests, targets: [B, L, D] what goes into the block, the rest of the pruned layer's
            output, and what is wanted of both.
        changes: squared change of the residual stream by the original layer, of the tokens that
            teach and of those that judge.
    """

    def __init__(
        self,
        split: LayerSplit,
        batches: Sequence[Batch],
        given: Sequence[Tensor],
        rests: Sequence[Tensor],
        targets: Sequence[Tensor],
        held: Callable[[Batch], Tensor],
        changes: tuple[float, float],
    ) -> None:
        self.split, self.module = split, split.block
        self.given, self.rests, self.targets = given, rests, targets
        self.kinds = _Kinds(batches, held)
        self.teaching, self.judging = self.kinds.teaching, self.kinds.judging
        self.unit = changes[0] / max(1, sum(self.kinds.counts[False]))
        self.size = changes[1]
        self._rows: dict[tuple[int, bool], Tensor] = {}

    def error(self, j: int, weights: Mapping[str, Tensor], *, judging: bool) -> tuple[Tensor, int]:
        """Squared error of a batch's tokens of a kind with these weights; how many they are."""
        x, rest, target = (
            self._some(t[j], j, judging) for t in (self.given, self.rests, self.targets)
        )
        out = self.split.run(x.unsqueeze(0), weights).squeeze(0)
        wanted = target.float() - rest.float()
        return (wanted - out.float()).square().sum(), len(x)

    def _some(self, hidden: Tensor, j: int, judging: bool) -> Tensor:
        """[N, D] of the tokens of a kind."""
        flat = hidden.flatten(0, 1)
        if self.kinds.counts[judging][j] == len(flat):
            return flat
        if (j, judging) not in self._rows:
            self._rows[j, judging] = self.kinds.masks[judging][j].flatten().nonzero().squeeze(1)
        return flat[self._rows[j, judging]]


def change(batch: Batch, out: Tensor, hidden: Tensor, held: Callable[[Batch], Tensor]) -> Tensor:
    """[2] squared change from one [B, L, D] to the other, of what teaches and what judges."""
    real, judge = batch.mask.bool(), held(batch).unsqueeze(1)
    return torch.stack([_squares(out, hidden, real & ~judge), _squares(out, hidden, real & judge)])


def _squares(a: Tensor, b: Tensor, mask: Tensor) -> Tensor:
    """Σ (a - b)² over the masked tokens of [B, L, D]: streams are far larger than what is between
    them, so they are subtracted in float32."""
    return ((a.float() - b.float()).square().sum(-1) * mask).sum()
