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
from moe_fair.engines.layer_calls import LayerCall
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


class Kinds:
    """Which tokens teach and which judge, by kind (`False` teaches) and batch.

    Found out on the host and once for all layers: a device would be waited for every time.

    Args:
        held: batch -> [B] which sequences judge instead of teach.

    Attributes:
        rows: [N] places in the flattened batch; None where that is all of it.
        counts: N.
        teaching, judging: the batches that have tokens of a kind.
    """

    def __init__(
        self, batches: Sequence[Batch], held: Callable[[Batch], Tensor], device: torch.device
    ) -> None:
        self.rows: dict[bool, list[Tensor | None]] = {False: [], True: []}
        self.counts: dict[bool, list[int]] = {False: [], True: []}
        found: list[Tensor] = []
        for b in batches:
            here = b.to(torch.device("cpu"))
            real, judge = here.mask.bool(), held(here).unsqueeze(1)
            found += [(real & its).flatten().nonzero().squeeze(1) for its in (~judge, judge)]
        there = torch.cat(found).to(device).split([len(rows) for rows in found])  # one copy
        for i, rows in enumerate(there):
            every = len(rows) == batches[i // 2].mask.numel()
            self.counts[bool(i % 2)].append(len(rows))
            self.rows[bool(i % 2)].append(None if every else rows)
        self.teaching = [j for j, n in enumerate(self.counts[False]) if n]
        self.judging = [j for j, n in enumerate(self.counts[True]) if n]

    def some(self, x: Tensor, j: int, judging: bool) -> Tensor:
        """[N, ...] of a kind of [T, ...] of a batch's tokens."""
        rows = self.rows[judging][j]
        return x if rows is None else x.index_select(0, rows)

    def squares(self, j: int, a: Tensor, b: Tensor, judging: bool) -> Tensor:
        """Σ (a - b)² over a batch's tokens of a kind, of [B, L, D]: streams are far larger than
        what is between them, so they are subtracted in float32."""
        one, other = (self.some(t.flatten(0, 1), j, judging).float() for t in (a, b))
        return (one - other).square().sum()

    def change(self, j: int, out: Tensor, hidden: Tensor) -> Tensor:
        """[2] squared change of a batch from one [B, L, D] to the other, by kind."""
        return torch.stack([self.squares(j, out, hidden, k) for k in (False, True)])


class LayerExamples:
    """A whole layer's: [B, L, D] hidden states into the pruned layer, and wanted out of it.

    Args:
        calls: what the model hands to the layer with each batch.
    """

    def __init__(
        self,
        layer: nn.Module,
        calls: Sequence[LayerCall],
        kinds: Kinds,
        inputs: Sequence[Tensor],
        targets: Sequence[Tensor],
    ) -> None:
        self.module, self.calls, self.kinds = layer, calls, kinds
        self.inputs, self.targets = inputs, targets
        self.teaching, self.judging = kinds.teaching, kinds.judging
        pairs = enumerate(zip(targets, inputs, strict=True))
        changes = [kinds.change(j, t, x).double() for j, (t, x) in pairs]
        learned, self.size = torch.stack(changes).sum(0).tolist()
        self.unit = learned / max(1, sum(kinds.counts[False]))

    def error(self, j: int, weights: Mapping[str, Tensor], *, judging: bool) -> tuple[Tensor, int]:
        """Squared error of a batch's tokens of a kind with these weights; how many they are."""

        def forward(*arguments: Any, **keywords: Any) -> Any:
            return functional_call(self.module, dict(weights), arguments, keywords)

        out = self.calls[j].run(forward, self.inputs[j])
        error = self.kinds.squares(j, self.targets[j], out, judging)
        return error, self.kinds.counts[judging][j]


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
        kinds: Kinds,
        given: Sequence[Tensor],
        rests: Sequence[Tensor],
        targets: Sequence[Tensor],
        changes: tuple[float, float],
    ) -> None:
        self.split, self.module, self.kinds = split, split.block, kinds
        self.given, self.rests, self.targets = given, rests, targets
        self.teaching, self.judging = kinds.teaching, kinds.judging
        self.unit = changes[0] / max(1, sum(kinds.counts[False]))
        self.size = changes[1]

    def error(self, j: int, weights: Mapping[str, Tensor], *, judging: bool) -> tuple[Tensor, int]:
        """Squared error of a batch's tokens of a kind with these weights; how many they are."""
        x, rest, target = (
            self.kinds.some(t[j].flatten(0, 1), j, judging)
            for t in (self.given, self.rests, self.targets)
        )
        out = self.split.run(x.unsqueeze(0), weights).squeeze(0)
        wanted = target.float() - rest.float()
        return (wanted - out.float()).square().sum(), len(x)
