"""The streaming engine: exact statistics and gradients with one decoder layer in memory.

Forward once through all layers, keeping each layer's input; the loss from the last hidden states;
then backward layer by layer, each layer's forward run again from its kept input. An observer sees
every batch at every layer, in the visit in which the gradient is there.

The model's own forward runs with stub layers in place of the real ones, once to learn which
arguments it hands to its layers (masks, positions, rotary tables) and once to turn the last hidden
states into the loss; so nothing here knows any family.

Shape legend: B sequences, L tokens, D model, V vocabulary.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor
from torch.nn import functional as F

from moe_fair.engines.batch import (
    After,
    Batch,
    Observer,
    Visit,
    quietly,
    sequence_losses,
    token_losses,
)
from moe_fair.engines.boundaries import Boundaries
from moe_fair.engines.decoder import last_hidden_states
from moe_fair.engines.layer_calls import LayerCall, Stubs, call_layers
from moe_fair.engines.layers import OUTSIDE, LayeredModel
from moe_fair.engines.loaded import LoadedLayers

LOGITS = 2**24  # elements; float32 logits of one chunk take four times as many bytes


class StreamingEngine:
    """Runs batches through a model that is never whole in memory.

    Args:
        layered: the model.
        device_bytes, host_bytes: of every layer's inputs, which wait for the backward, so many stay
            on the device, so many more in the main memory of a device that has its own; what is
            more goes to files.
        visit: see `batch.Visit`.
    """

    def __init__(
        self,
        layered: LayeredModel | LoadedLayers,
        *,
        device_bytes: int = 2**28,
        host_bytes: int = 0,
        visit: Visit = quietly,
    ) -> None:
        self.layered, self.model = layered, layered.model
        self.device_bytes, self.host_bytes, self.visit = device_bytes, host_bytes, visit
        self.seconds: dict[str, float] = {}  # per phase of the last run, loading of layers apart

    @property
    def bytes_read(self) -> int:
        """What this process has asked of the checkpoint's files."""
        return self.layered.bytes_read

    def run(
        self,
        batches: Sequence[Batch],
        observer: Observer,
        *,
        backward: bool = True,
        after: After | None = None,
    ) -> None:
        """Forward, and with `backward` also backward, over the batches, telling the observer."""
        batches = [b.to(self.layered.device) for b in batches]
        self.seconds = {"reading weights": self.layered.seconds}
        layers = range(len(self.layered))
        back = [OUTSIDE, *reversed(layers)] if backward else [OUTSIDE] if after else []
        with (
            self.layered.in_step([OUTSIDE, *layers, *back]),
            Boundaries(self.device_bytes, self.host_bytes) as kept,
        ):
            with self._timed("forward"):
                calls, hidden = self.embed(batches)
                hidden = self._forward(batches, calls, hidden, observer, kept if backward else None)
            if backward or after is not None:
                with self._timed("loss"), self.layered.outside():
                    gradients = self._gradients(batches, hidden) if backward else []
                    if after is not None:
                        self._go_on(batches, hidden, observer, after, backward)
            if backward:
                with self._timed("backward"):
                    self._backward(batches, calls, gradients, observer, kept)

    @contextmanager
    def _timed(self, phase: str) -> Iterator[None]:
        started, loaded = time.perf_counter(), self.layered.seconds
        yield
        loading = self.layered.seconds - loaded
        self.seconds["reading weights"] += loading
        self.seconds[phase] = time.perf_counter() - started - loading

    @torch.no_grad()
    def losses(self, batches: Sequence[Batch]) -> Iterator[tuple[Tensor, Tensor]]:
        """Next-token losses of every batch and their weights, [B, L - 1] each."""
        batches = [b.to(self.layered.device) for b in batches]
        with self.layered.in_step([OUTSIDE, *range(len(self.layered)), OUTSIDE]):
            calls, hidden = self.embed(batches)
            hidden = self._forward(batches, calls, hidden, None, None)
            with self.layered.outside():
                yield from self._losses(batches, hidden)

    def _losses(
        self, batches: Sequence[Batch], hidden: Sequence[Tensor]
    ) -> Iterator[tuple[Tensor, Tensor]]:
        for batch, last in zip(batches, hidden, strict=True):
            losses, weights = zip(*self.losses_of(batch, last), strict=True)
            yield torch.cat(losses, 1), torch.cat(weights, 1)

    @torch.no_grad()
    def logits(self, batches: Sequence[Batch]) -> Iterator[Tensor]:
        """Logits of every batch, [B, L, V]."""
        batches = [b.to(self.layered.device) for b in batches]
        calls, hidden = self.embed(batches)
        hidden = self._forward(batches, calls, hidden, None, None)
        with self.layered.outside():
            for batch, last in zip(batches, hidden, strict=True):
                yield self._logits(batch, last)

    @torch.no_grad()
    def embed(self, batches: Sequence[Batch]) -> tuple[list[list[LayerCall]], list[Tensor]]:
        """The arguments of every layer for every batch, and the first layer's input."""
        calls: list[list[LayerCall]] = []
        first: list[Tensor] = []
        with self.layered.outside():
            for batch in batches:
                embedded, called = call_layers(
                    self.layered.decoder, batch.input_ids, batch.attention_mask()
                )
                calls.append(called)
                first.append(embedded)
        return calls, first

    @torch.no_grad()
    def _forward(
        self,
        batches: Sequence[Batch],
        calls: list[list[LayerCall]],
        hidden: list[Tensor],
        observer: Observer | None,
        kept: Boundaries | None,
    ) -> list[Tensor]:
        """The last layer's output, [B, L, D] a batch; every layer's input goes to `kept`.

        Without gradients an observer of Taylor values books nothing here.
        """
        depth = len(self.layered)
        for i in range(depth):
            with self.layered.layer(i, i + 1 if i + 1 < depth else None) as layer:
                for j, batch in enumerate(self.visit("forward", i, batches)):
                    if observer is not None:
                        observer.begin(batch)
                    if kept is not None:
                        kept.put((i, j), hidden[j])
                    hidden[j] = calls[j][i].run(layer, hidden[j])
        return hidden

    def _go_on(
        self,
        batches: Sequence[Batch],
        hidden: Sequence[Tensor],
        observer: Observer,
        after: After,
        backward: bool,
    ) -> None:
        """Hand on what the final norm makes of the last layer's output."""
        with after:
            for batch, output in zip(batches, hidden, strict=True):
                stubs = Stubs(self.layered.decoder, output=output)
                with torch.no_grad(), stubs.standing_in(), last_hidden_states(self.model) as last:
                    self.layered.decoder.entry(
                        input_ids=batch.input_ids,
                        attention_mask=batch.attention_mask(),
                        use_cache=False,
                    )
                after.run(batch, last[0], observer, backward=backward)

    def _gradients(self, batches: Sequence[Batch], hidden: list[Tensor]) -> list[Tensor]:
        """dL/d(last hidden states) for every batch, [B, L, D]."""
        gradients = []
        for batch, last in zip(batches, hidden, strict=True):
            last = last.detach().requires_grad_(True)
            for losses, weights in self.losses_of(batch, last):
                sequence_losses(losses, weights, batch.predicted()).sum().backward()
            assert last.grad is not None
            gradients.append(last.grad)
        return gradients

    def losses_of(self, batch: Batch, last: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
        """Losses and weights of the predicted tokens, in chunks so that logits stay small.

        A batch whose logits fit the limit is one chunk, computed as the resident engine does.
        """
        b, length = batch.mask.shape
        vocabulary = self.model.config.get_text_config().vocab_size
        chunk = max(1, LOGITS // (b * vocabulary))
        if chunk >= length:
            yield token_losses(self._logits(batch, last), batch)
            return
        for start in range(0, length - 1, chunk):
            keep = torch.arange(start, min(start + chunk, length - 1), device=last.device)
            logits = self._logits(batch, last, logits_to_keep=keep)
            assert logits.shape[1] == len(keep), "the model does not know logits_to_keep"
            targets = batch.input_ids[:, keep + 1]
            losses = F.cross_entropy(
                logits.float().flatten(0, 1), targets.flatten(), reduction="none"
            )
            yield losses.view_as(targets), batch.mask[:, keep + 1]

    def _logits(self, batch: Batch, last: Tensor, **keep: Tensor) -> Tensor:
        """The model's logits from its last hidden states, its layers standing aside."""
        stubs = Stubs(self.layered.decoder, output=last)
        with stubs.standing_in(), torch.set_grad_enabled(last.requires_grad):
            return self.model(
                input_ids=batch.input_ids,
                attention_mask=batch.attention_mask(),
                use_cache=False,
                **keep,
            ).logits

    def _backward(
        self,
        batches: Sequence[Batch],
        calls: list[list[LayerCall]],
        gradients: list[Tensor],
        observer: Observer,
        kept: Boundaries,
    ) -> None:
        for i in reversed(range(len(self.layered))):
            with self.layered.layer(i, i - 1 if i else None) as layer:
                for j, batch in enumerate(self.visit("backward", i, batches)):
                    observer.begin(batch)
                    entry = kept.pop((i, j), self.layered.device).requires_grad_(True)
                    with torch.enable_grad():
                        output = calls[j][i].run(layer, entry)
                    output.backward(gradients[j])
                    assert entry.grad is not None
                    gradients[j] = entry.grad
