"""A model in memory, seen a decoder layer at a time: what a layer-wise procedure runs on."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from moe_fair.engines.decoder import find_decoder


class LoadedLayers:
    """The interface of `LayeredModel` over a model whose weights are all there.

    Args:
        model: a causal language model; its weights are frozen and it is put in eval mode.

    Raises:
        ValueError: the model has no plain list of decoder layers.
    """

    def __init__(self, model: Any) -> None:
        self.model = model.eval().requires_grad_(False)
        self.decoder = find_decoder(model)
        self.device = next(model.parameters()).device
        self.dtype: torch.dtype = model.dtype
        self.seconds = 0.0
        self.bytes_read = 0

    def __len__(self) -> int:
        return len(self.decoder.layers)

    @contextmanager
    def in_step(self, groups: Sequence[int]) -> Iterator[None]:
        """Nothing is read."""
        yield

    @contextmanager
    def layer(self, index: int, following: int | None = None) -> Iterator[nn.Module]:
        """The layer."""
        yield self.decoder.layers[index]

    @contextmanager
    def outside(self) -> Iterator[None]:
        """Embeddings, final norm and head are there anyway."""
        yield
