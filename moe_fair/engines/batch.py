"""A batch of calibration sequences, and the loss that is differentiated.

Shape legend: B sequences of a batch, L tokens, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Protocol

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
        ids, mask, sequences = (
            t.to(device) for t in (self.input_ids, self.mask, self.sequence_ids)
        )
        return Batch(ids, mask, sequences, self.domain)

    @property
    def padded(self) -> bool:
        """Some position is padding."""
        return not bool(self.mask.all())

    def attention_mask(self) -> Tensor | None:
        """The mask, or None where nothing is padded (the fast path of every attention kernel)."""
        return self.mask if self.padded else None


class Observer(Protocol):
    """What an engine tells about the run; what it does with that is its own affair."""

    def begin(self, batch: Batch) -> None:
        """The next forward (and backward) runs this batch."""
        ...


class Engine(Protocol):
    """How a model is run: whole, or a layer at a time."""

    def run(self, batches: Iterable[Batch], observer: Observer, *, backward: bool = True) -> None:
        """Forward, and backward of the summed sequence losses, over the batches."""
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


def sequence_losses(logits: Tensor, batch: Batch) -> Tensor:
    """[B] mean next-token loss of each sequence (METHODS: L); what Taylor scores differentiate.

    The mean is per sequence, so a sequence's values do not depend on what shares its batch.
    """
    losses, weights = token_losses(logits, batch)
    return (losses * weights).sum(1) / weights.sum(1).clamp(min=1)
