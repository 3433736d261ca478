"""A batch of calibration sequences, and the loss that is differentiated.

Shape legend: B sequences of a batch, L tokens, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.nn import functional as F


@dataclass(frozen=True)
class Batch:
    """Sequences of one domain.

    Attributes:
        input_ids: [B, L] int64, padded on the right.
        mask: [B, L] int64, 1 for a token, 0 for padding.
        sequence_ids: [B] int64, index of each sequence in the calibration set.
        domain: index of the calibration domain that all of them belong to.
    """

    input_ids: Tensor
    mask: Tensor
    sequence_ids: Tensor
    domain: int

    def to(self, device: torch.device) -> Batch:
        """The same batch on another device."""
        if self.mask.device == device:
            return self
        ids, mask, sequences = (
            t.to(device) for t in (self.input_ids, self.mask, self.sequence_ids)
        )
        return Batch(ids, mask, sequences, self.domain)

    def parts(self, most: int | None) -> list[Batch]:
        """The batch in parts of at most so many sequences, as padded as it is; None: whole."""
        if most is None or len(self.mask) <= most:
            return [self]
        rows = [slice(i, i + most) for i in range(0, len(self.mask), most)]
        return [
            Batch(self.input_ids[r], self.mask[r], self.sequence_ids[r], self.domain) for r in rows
        ]

    @cached_property
    def padded(self) -> bool:
        """Some position is padding; asked of the device once."""
        return not bool(self.mask.all())

    def predicted(self) -> Tensor:
        """[B] tokens of each sequence that are predicted from one before; at least 1."""
        return self.mask[:, 1:].sum(1).clamp(min=1)

    def attention_mask(self) -> Tensor | None:
        """The mask, or None where nothing is padded (the fast path of every attention kernel)."""
        return self.mask if self.padded else None


# visit(what, layer, batches): a pass over the batches, perhaps showing progress
Visit = Callable[[str, int | None, Sequence[Batch]], Iterable[Batch]]


def quietly(what: str, layer: int | None, batches: Sequence[Batch]) -> Iterable[Batch]:
    """A pass that shows nothing."""
    return batches


class Observer(Protocol):
    """What an engine tells about the run; what it does with that is its own affair."""

    def begin(self, batch: Batch) -> None:
        """The next forward (and backward) runs this batch."""
        ...


class After(Protocol):
    """What goes on from the model's last hidden states; its weights are there while it is entered.

    Embeddings and output matrix are in memory then.
    """

    def __enter__(self) -> Any: ...

    def __exit__(self, *exception: object) -> None: ...

    def run(self, batch: Batch, last: Tensor, observer: Observer, *, backward: bool) -> None:
        """Go on with one batch from `last` [B, L, D], the output of the final norm."""
        ...


class Losses(Protocol):
    """What can measure next-token losses."""

    def losses(self, batches: Sequence[Batch]) -> Iterator[tuple[Tensor, Tensor]]:
        """See `Engine.losses`."""
        ...


class Engine(Protocol):
    """How a model is run: whole, or a layer at a time.

    Attributes:
        seconds: phase -> wall time of the last run.
        bytes_read: what this process has asked of the checkpoint's files while running.
    """

    seconds: dict[str, float]

    @property
    def bytes_read(self) -> int: ...

    def run(
        self,
        batches: Sequence[Batch],
        observer: Observer,
        *,
        backward: bool = True,
        after: After | None = None,
    ) -> None:
        """Forward, and backward of the summed sequence losses, over the batches.

        Args:
            after: is handed every batch's last hidden states.
        """
        ...

    def losses(self, batches: Sequence[Batch]) -> Iterator[tuple[Tensor, Tensor]]:
        """Per batch: next-token losses [B, L - 1] and their weights, see `token_losses`."""
        ...

    def logits(self, batches: Sequence[Batch]) -> Iterator[Tensor]:
        """Per batch: logits [B, L, V] on the device; the caller keeps batches small."""
        ...


def token_losses(logits: Tensor, batch: Batch) -> tuple[Tensor, Tensor]:
    """Next-token negative log-likelihood of every position and whether it counts.

    Args:
        logits: [B, L, V].

    Returns:
        losses [B, L - 1] float32 and weights [B, L - 1] (0 where the target is padding).
    """
    targets, weights = batch.input_ids[:, 1:], batch.mask[:, 1:]
    flat = F.cross_entropy(
        logits[:, :-1].float().flatten(0, 1), targets.flatten(), reduction="none"
    )
    return flat.view_as(targets), weights


def sequence_losses(losses: Tensor, weights: Tensor, tokens: Tensor) -> Tensor:
    """[B] mean next-token loss of each sequence (L in docs/methods.md): what Taylor scores
    differentiate.

    The mean is per sequence, so a sequence's values do not depend on what shares its batch.

    Args:
        losses, weights: [B, L - 1] or some of its columns, from `token_losses`.
        tokens: [B] predicted tokens of each sequence, see `Batch.predicted`.
    """
    return (losses * weights).sum(1) / tokens
