"""The resident engine: the whole model in memory, or spread over devices by accelerate."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from moe_fair.engines.batch import Batch, Observer, Visit, quietly, sequence_losses, token_losses


class ResidentEngine:
    """Runs batches through a loaded model with its weights frozen.

    No weight ever needs a gradient: observers put differentiable gates on activations, and the
    backward pass goes no deeper than the first of them.

    Args:
        model: a causal language model; its weights are frozen and it is put in eval mode.
        visit: see `batch.Visit`.
    """

    def __init__(self, model: torch.nn.Module, *, visit: Visit = quietly) -> None:
        self.visit = visit
        self.seconds: dict[str, float] = {}  # as the streaming engine has it; here one phase
        self.bytes_read = 0  # the weights are there
        self.model = model.eval().requires_grad_(False)
        self.device = next(model.parameters()).device

    def run(self, batches: Sequence[Batch], observer: Observer, *, backward: bool = True) -> None:
        """Forward, and with `backward` also backward, over the batches, telling the observer."""
        started = time.perf_counter()
        for batch in self.visit("calibrating", None, batches):
            batch = batch.to(self.device)
            observer.begin(batch)
            with torch.set_grad_enabled(backward):
                logits = self._logits(batch)
            if backward:
                losses, weights = token_losses(logits, batch)
                sequence_losses(losses, weights, batch.predicted()).sum().backward()
        self.seconds = {
            "forward and backward" if backward else "forward": time.perf_counter() - started
        }

    @torch.no_grad()
    def losses(self, batches: Sequence[Batch]) -> Iterator[tuple[Tensor, Tensor]]:
        """Next-token losses of every batch and their weights, [B, L - 1] each."""
        for batch in self.visit("measuring", None, batches):
            batch = batch.to(self.device)
            yield token_losses(self._logits(batch), batch)

    def _logits(self, batch: Batch) -> Tensor:
        return self.model(
            input_ids=batch.input_ids, attention_mask=batch.attention_mask(), use_cache=False
        ).logits
