"""The resident engine: the whole model in memory, or spread over devices by accelerate."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from moe_fair.engines.batch import (
    After,
    Batch,
    Observer,
    Visit,
    quietly,
    sequence_losses,
    token_losses,
)
from moe_fair.engines.decoder import find_decoder, last_hidden_states


class ResidentEngine:
    """Runs batches through a loaded model with its weights frozen.

    No weight ever needs a gradient: observers put differentiable gates on activations, and the
    backward pass goes no deeper than the first of them.

    Args:
        model: a causal language model; its weights are frozen and it is put in eval mode.
        visit: see `batch.Visit`.
        checkpointing: run each decoder layer again in the backward, so that one layer's activations
            (and weights, where accelerate offloads them) are kept at a time.

    Raises:
        ValueError: checkpointing, and the model has no plain list of decoder layers.
    """

    def __init__(self, model: Any, *, visit: Visit = quietly, checkpointing: bool = False) -> None:
        self.visit = visit
        self.seconds: dict[str, float] = {}  # as the streaming engine has it; here one phase
        self.bytes_read = 0  # the weights are there
        self.model = model.eval().requires_grad_(False)
        self.device = _input_device(model)
        self.layers: tuple[nn.Module, ...] = ()
        if checkpointing:
            self.layers = tuple(find_decoder(model).layers)

    def run(
        self,
        batches: Sequence[Batch],
        observer: Observer,
        *,
        backward: bool = True,
        after: After | None = None,
    ) -> None:
        """Forward, and with `backward` also backward, over the batches, telling the observer."""
        started = time.perf_counter()
        with after or nullcontext():
            for batch in self.visit("calibrating", None, batches):
                batch = batch.to(self.device)
                observer.begin(batch)
                with torch.set_grad_enabled(backward), self._checkpointed(backward):
                    if after is None:
                        logits = self._logits(batch)
                    else:
                        with last_hidden_states(self.model) as last:
                            logits = self._logits(batch)
                    if backward:
                        losses, weights = token_losses(logits, batch)
                        sequence_losses(losses, weights, batch.predicted()).sum().backward()
                del logits
                if after is not None:
                    after.run(batch, last[0], observer, backward=backward)
        self.seconds = {
            "forward and backward" if backward else "forward": time.perf_counter() - started
        }

    @torch.no_grad()
    def losses(self, batches: Sequence[Batch]) -> Iterator[tuple[Tensor, Tensor]]:
        """Next-token losses of every batch and their weights, [B, L - 1] each."""
        for batch in self.visit("measuring", None, batches):
            batch = batch.to(self.device)
            yield token_losses(self._logits(batch), batch)

    @torch.no_grad()
    def logits(self, batches: Sequence[Batch]) -> Iterator[Tensor]:
        """Logits of every batch, [B, L, V]."""
        for batch in self.visit("measuring", None, batches):
            yield self._logits(batch.to(self.device))

    def _checkpointed(self, backward: bool) -> AbstractContextManager[None]:
        return checkpointed(self.model, self.layers if backward else ())

    def _logits(self, batch: Batch) -> Tensor:
        return self.model(
            input_ids=batch.input_ids, attention_mask=batch.attention_mask(), use_cache=False
        ).logits


@contextmanager
def checkpointed(model: Any, layers: Sequence[nn.Module]) -> Iterator[None]:
    """These layers note their input alone; the embeddings' output takes the gradient."""
    if not layers:
        yield
        return
    stock = [layer.forward for layer in layers]
    own = ["forward" in layer.__dict__ for layer in layers]  # accelerate's hook
    entry = model.get_input_embeddings().register_forward_hook(
        lambda module, inputs, output: output.requires_grad_(True)
    )
    for layer, forward in zip(layers, stock, strict=True):
        layer.forward = partial(_again, forward)
    try:
        yield
    finally:
        entry.remove()
        for layer, forward, hooked in zip(layers, stock, own, strict=True):
            del layer.forward
            if hooked:
                layer.forward = forward


def _again(forward: Callable[..., Any], *arguments: Any, **keywords: Any) -> Any:
    """A layer's forward without what its backward needs; the backward runs it again."""
    hidden = arguments[0] if arguments else keywords.pop("hidden_states")
    return checkpoint(
        lambda h: forward(h, *arguments[1:], **keywords),
        hidden,
        use_reentrant=True,  # the first pass then has no gradient, and observers book the second
        preserve_rng_state=False,
    )


def _input_device(model: Any) -> torch.device:
    """Where a batch goes first: to weights that stay where they are, else where accelerate says."""
    stays = (p.device for p in model.parameters() if not p.is_meta)
    found = next(stays, None)
    return torch.device(model._hf_hook.execution_device) if found is None else found
