"""Running the heads for multi-token prediction (see `mtp`) behind a model that an engine runs.

A head sees the trunk's hidden states as they are and the true next tokens; its loss is that of the
token after. So it is a model of its own on a batch that is shifted by one token, gradients stay
within it, and the collector books its experts as it books every block's.

Shape legend: B sequences, L tokens, D model, V vocabulary.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor, nn
from torch.nn import functional as F

from moe_fair.engines.batch import Batch, Observer, sequence_losses, token_losses
from moe_fair.engines.decoder import final_norm, find_decoder
from moe_fair.engines.empty_weights import without_weights
from moe_fair.engines.layer_calls import call_layers
from moe_fair.engines.layers import LayeredModel
from moe_fair.engines.shards import StoredTensor
from moe_fair.engines.streaming import LOGITS
from moe_fair.moe.blocks import MoeBlock
from moe_fair.moe.checkpoint_source import Checkpoint
from moe_fair.moe.mtp import (
    EMBEDDING,
    HIDDEN,
    OUTPUT,
    PROJECTION,
    Head,
    HeadLayer,
    block_of,
    fresh_layer,
)


class HeadRunner:
    """Runs a checkpoint's heads from the hidden states of a model; see `engines.batch.After`.

    Args:
        source: the checkpoint, whose heads have a known structure.
        model: what an engine runs of it: its embeddings and output matrix are used.
        dtype, device: of the heads' weights.

    Attributes:
        blocks: the heads' MoE blocks.
        drafted, accepted: tokens that the heads predicted so far, and those that the model predicts
            as well, after everything before it was accepted.
    """

    def __init__(
        self, source: Checkpoint, model: Any, dtype: torch.dtype, device: torch.device
    ) -> None:
        self.model, self.device = model, device
        self.heads = [_Head(source, head, dtype, device) for head in source.heads.chain]
        self.blocks: list[MoeBlock] = [b for h in self.heads for b in h.blocks]
        self.drafted = self.accepted = 0
        self._open = ExitStack()

    def __enter__(self) -> HeadRunner:
        for head in self.heads:
            self._open.enter_context(head.loaded())
        return self

    def __exit__(self, *exception: object) -> None:
        self._open.close()

    def run(self, batch: Batch, last: Tensor, observer: Observer, *, backward: bool) -> None:
        """Every head in turn on one batch; with `backward` of its own loss alone.

        Args:
            last: [B, L, D], the output of the model's final norm.
        """
        batch, last = batch.to(self.device), last.to(self.device)
        model_says = None if backward else self._best(last)
        accepted = torch.ones_like(batch.mask, dtype=torch.bool)
        for step, head in enumerate(self.heads, 1):
            batch = _shifted(batch)
            if not batch.mask.numel():
                return
            embedded, calls = call_layers(
                find_decoder(self.model), batch.input_ids, _attended(batch)
            )
            observer.begin(batch)
            with torch.set_grad_enabled(backward):
                output = head.forward(embedded.to(self.device), last[:, :-1], calls)
            if backward:
                self._backward(batch, output)
            last = output.detach()
            if model_says is not None:
                same = self._best(last) == model_says[:, step:]
                accepted = accepted[:, :-1] & same
                counted = batch.mask[:, 1:].bool()
                self.drafted += int(counted.sum())
                self.accepted += int((accepted[:, :-1] & counted).sum())

    def _backward(self, batch: Batch, output: Tensor) -> None:
        """From the loss to the experts; logits in chunks of the streaming engine's size."""
        leaf = output.detach().requires_grad_(True)
        b, length = batch.mask.shape
        width = max(1, LOGITS // (b * self.model.get_output_embeddings().out_features))
        if width >= length:
            losses, weights = token_losses(self._logits(leaf), batch)
            sequence_losses(losses, weights, batch.predicted()).sum().backward()
        for start in range(0, length - 1, width) if width < length else ():
            s = slice(start, min(start + width, length - 1))
            targets = batch.input_ids[:, s.start + 1 : s.stop + 1]
            losses = F.cross_entropy(
                self._logits(leaf[:, s]).float().flatten(0, 1), targets.flatten(), reduction="none"
            ).view_as(targets)
            weights = batch.mask[:, s.start + 1 : s.stop + 1]
            sequence_losses(losses, weights, batch.predicted()).sum().backward()
        output.backward(leaf.grad)

    def _logits(self, hidden: Tensor) -> Tensor:
        logits: Tensor = self.model.get_output_embeddings()(hidden)
        return logits

    @torch.no_grad()
    def _best(self, hidden: Tensor) -> Tensor:
        """[B, L] the token with the largest logit at every position."""
        width = max(1, LOGITS // (len(hidden) * self.model.get_output_embeddings().out_features))
        return torch.cat([self._logits(h).argmax(-1) for h in hidden.split(width, dim=1)], 1)


class Drafting:
    """Watches an engine for nothing but what its model's heads draft."""

    def __init__(self, runner: HeadRunner) -> None:
        self.after = runner

    def __enter__(self) -> Drafting:
        return self

    def __exit__(self, *exception: object) -> None:
        pass

    def begin(self, batch: Batch) -> None:
        """Nothing is noted of the model's own layers."""


class _Head:
    """One head's modules, whose weights come and go."""

    def __init__(
        self, source: Checkpoint, head: Head, dtype: torch.dtype, device: torch.device
    ) -> None:
        self.head, self.dtype, self.device = head, dtype, device
        self.blocks: list[MoeBlock] = []
        self.layers: list[tuple[LayeredModel, int]] = []
        for layer in head.layers:
            layered = LayeredModel(
                source.path,
                source.config,
                dtype=dtype,
                device=device,
                trust_remote_code=source.trust_remote_code,
                tensors=layer.tensors,
            )
            if layer.block is not None:
                self.blocks.append(_placed(layered, layer, layer.block))
            self.layers.append((layered, layer.template))
        norm = copy.deepcopy(final_norm(self.layers[0][0].model))
        self.norms = {role: copy.deepcopy(norm) for role in (EMBEDDING, HIDDEN, OUTPUT)}
        self.projection: Tensor

    @contextmanager
    def loaded(self) -> Iterator[None]:
        """The weights are there; on leaving they are dropped."""
        with ExitStack() as stack:
            for layered, index in self.layers:
                stack.enter_context(layered.layer(index))
            for role, norm in self.norms.items():
                norm.weight = nn.Parameter(self._read(self.head.around[role]), requires_grad=False)
            self.projection = self._read(self.head.around[PROJECTION])
            try:
                yield
            finally:
                del self.projection

    def forward(self, embedded: Tensor, hidden: Tensor, calls: list[Any]) -> Tensor:
        """[B, L, D] from the next tokens' embeddings and the hidden states before, as large."""
        pair = self.norms[EMBEDDING](embedded), self.norms[HIDDEN](hidden)
        x = F.linear(torch.cat(pair, dim=-1), self.projection)
        for layered, index in self.layers:
            layer: Callable[..., Any] = layered.decoder.layers[index]
            x = calls[index].run(layer, x)
        output: Tensor = self.norms[OUTPUT](x)
        return output

    def _read(self, t: StoredTensor) -> Tensor:
        with safe_open(t.pieces[0].file, framework="pt") as f:
            read: Tensor = f.get_tensor(t.name)
        return read.to(self.device, self.dtype)


def _placed(layered: LayeredModel, layer: HeadLayer, like: MoeBlock) -> MoeBlock:
    """The head's block in the place of its template's, which may have another number of experts."""
    block = block_of(layered.decoder.layers[layer.template])
    if block is not None and block.num_experts != layer.experts:
        usual = torch.get_default_dtype()
        torch.set_default_dtype(layered.dtype)
        try:
            with without_weights():
                fresh = fresh_layer(layered.model, layer.template, layer.experts)
        finally:
            torch.set_default_dtype(usual)
        for buffer in fresh.buffers():
            buffer.data = buffer.data.to(layered.device)
        layered.decoder.layers[layer.template] = fresh.eval().requires_grad_(False)
        block = block_of(fresh)
    assert block is not None
    return replace(block, name=like.name, layer=like.layer)


def _shifted(batch: Batch) -> Batch:
    """Without the first token: what is at a position is the token after it."""
    return Batch(batch.input_ids[:, 1:], batch.mask[:, 1:], batch.sequence_ids, batch.domain)


def _attended(batch: Batch) -> Tensor | None:
    """The mask with a first token in every sequence, lest attention to nothing make NaN.

    Padding is on the right, where no token looks.
    """
    if not batch.padded:
        return None
    mask = batch.mask.clone()
    mask[:, 0] = 1
    return mask
