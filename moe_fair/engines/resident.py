"""The resident engine: the whole model in memory, or spread over devices by accelerate."""

from __future__ import annotations

from collections.abc import Iterable

import torch

from moe_fair.engines.batch import Batch, Observer, sequence_losses


class ResidentEngine:
    """Runs batches through a loaded model with its weights frozen.

    No weight ever needs a gradient: observers put differentiable gates on activations, and the
    backward pass goes no deeper than the first of them.

    Args:
        model: a causal language model; its weights are frozen and it is put in eval mode.
    """

    def __init__(self, model: torch.nn.Module) -> None:
        self.model = model.eval().requires_grad_(False)
        self.device = next(model.parameters()).device

    def run(self, batches: Iterable[Batch], observer: Observer, *, backward: bool = True) -> None:
        """Forward, and with `backward` also backward, over the batches, telling the observer."""
        for batch in batches:
            batch = batch.to(self.device)
            observer.begin(batch)
            with torch.set_grad_enabled(backward):
                logits = self.model(
                    input_ids=batch.input_ids,
                    attention_mask=batch.attention_mask(),
                    use_cache=False,
                ).logits
            if backward:
                sequence_losses(logits, batch).sum().backward()
