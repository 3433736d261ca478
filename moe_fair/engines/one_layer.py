"""A model cut down to one loaded layer, to try out on it what a run would do."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from moe_fair.engines.layers import LayeredModel

ROWS = 8192  # of embeddings and output layer


@contextmanager
def alone(layered: LayeredModel, index: int) -> Iterator[tuple[Any, int]]:
    """The model as if this loaded layer were its only one; and how many ids it knows."""
    model, decoder = layered.model, layered.decoder
    config, every = model.config.get_text_config(), decoder.layers
    depth, rows = config.num_hidden_layers, min(ROWS, config.vocab_size)
    setattr(decoder.holder, decoder.name, nn.ModuleList([every[index]]))
    config.num_hidden_layers = 1
    text = {id(m): m for m in (*model.get_decoder().modules(), *model.children())}
    draw = torch.Generator().manual_seed(0)
    try:
        for module in text.values():
            short = isinstance(module, nn.Embedding) or module is model.get_output_embeddings()
            for name, p in module._parameters.items():
                if p is None or not p.is_meta:
                    continue
                shape = [min(rows, p.shape[0]) if short else p.shape[0], *p.shape[1:]]
                values = torch.randn(shape, generator=draw) if p.dim() > 1 else torch.ones(shape)
                new = nn.Parameter(values.to(layered.device, p.dtype), requires_grad=False)
                module._parameters[name] = new
            if isinstance(module, nn.Embedding):
                module.padding_idx = None  # it may lie beyond the rows
        yield model, rows
    finally:
        config.num_hidden_layers = depth
        setattr(decoder.holder, decoder.name, every)
