"""What a model hands to its decoder layers, learnt from its own forward with stubs in their place.

Shape legend: B sequences, L tokens, D model.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, MutableMapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

from moe_fair.engines.decoder import Decoder, find_decoder

NOT_ALONE = (
    "{}: a layer hands the next more than hidden states, so layers cannot be run one at a time; "
    "use --engine resident and --repair none"
)
SEVERAL = (
    "{}: layers carry several streams of hidden states, which no repair is made for; use "
    "--repair none"
)
CACHE_ARGUMENTS = ("past_key_values", "past_key_value", "use_cache", "cache_position")


class NotLayerwise(ValueError):
    """What a procedure needs that goes layer by layer does not hold for this model."""


@dataclass(frozen=True)
class LayerCall:
    """What the model hands to one layer beside the hidden states."""

    arguments: tuple[Any, ...]
    keywords: dict[str, Any]

    def run(self, layer: Callable[..., Any], hidden: Tensor) -> Tensor:
        shared = [v for v in self.keywords.values() if isinstance(v, MutableMapping)]
        before = [len(v) for v in shared]
        output = layer(hidden, *self.arguments, **self.keywords)
        hidden, *rest = output if isinstance(output, tuple) else (output,)
        if any(r is not None for r in rest) or before != [len(v) for v in shared]:
            raise NotLayerwise(NOT_ALONE.format(type(layer).__name__))
        return hidden


@torch.no_grad()
def call_layers(
    decoder: Decoder, input_ids: Tensor, attention_mask: Tensor | None
) -> tuple[Tensor, list[LayerCall]]:
    """What a model hands to its first layer, and to every layer beside the hidden states.

    Raises:
        NotLayerwise: layers hand on more than hidden states.
    """
    stubs = Stubs(decoder)
    with stubs.standing_in():
        try:
            decoder.entry(input_ids=input_ids, attention_mask=attention_mask, use_cache=False)
        except (ValueError, TypeError) as e:  # more than hidden states was unpacked
            raise NotLayerwise(NOT_ALONE.format(type(stubs.real[0]).__name__)) from e
    return stubs.first, stubs.calls


@torch.no_grad()
def check_layerwise(skeleton: nn.Module, *, several: bool = False) -> None:
    """Each layer of a model on the meta device hands the next one stream of hidden states alone.

    All but the layers runs for a few tokens, with memory that nobody fills in the weights' place.

    Args:
        several: streams will do, too.

    Raises:
        NotLayerwise: it hands on more. Where that cannot be found out so, nothing is raised: it
            shows when the layers run.
    """
    decoder = find_decoder(skeleton)
    stubs = Stubs(decoder)
    with stubs.standing_in():
        values = {n: torch.empty_like(p, device="cpu") for n, p in decoder.entry.named_parameters()}
        for name, b in decoder.entry.named_buffers():
            values[name] = torch.zeros_like(b, device="cpu")
        ids = torch.zeros(1, 4, dtype=torch.long)
        given = {"input_ids": ids, "attention_mask": None, "use_cache": False}
        try:
            functional_call(decoder.entry, values, (), given)
        except Exception as e:  # a model's own code may do anything on zeros
            if isinstance(e, ValueError | TypeError) and "unpack" in str(e):  # what a layer gave
                raise NotLayerwise(NOT_ALONE.format(type(stubs.real[0]).__name__)) from e
    if stubs.calls and stubs.first.dim() != 3 and not several:
        raise NotLayerwise(SEVERAL.format(type(skeleton).__name__))


class Stubs:
    """Layers that only note what they are called with; the last may hand out given states."""

    def __init__(self, decoder: Decoder, output: Tensor | None = None) -> None:
        self.calls: list[LayerCall] = []
        self.first: Tensor
        self.decoder, self.real = decoder, decoder.layers
        last = len(self.real) - 1
        self._list = nn.ModuleList(
            _Stub(self, layer, output if i == last else None) for i, layer in enumerate(self.real)
        )

    @contextmanager
    def standing_in(self) -> Iterator[None]:
        setattr(self.decoder.holder, self.decoder.name, self._list)
        try:
            yield
        finally:
            setattr(self.decoder.holder, self.decoder.name, self.real)


class _Stub(nn.Module):
    def __init__(self, stubs: Stubs, real: nn.Module, output: Tensor | None) -> None:
        super().__init__()
        # not registered as a child: the stub list must not own the real layers
        object.__setattr__(self, "real", real)
        object.__setattr__(self, "stubs", stubs)
        self.output = output

    def forward(self, *arguments: Any, **keywords: Any) -> Tensor:
        keywords = {k: v for k, v in keywords.items() if k not in CACHE_ARGUMENTS}
        hidden = arguments[0] if arguments else keywords.pop("hidden_states")
        if not self.stubs.calls:
            self.stubs.first = hidden.detach()
        self.stubs.calls.append(LayerCall(arguments[1:], keywords))
        return hidden if self.output is None else self.output

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:  # what a model reads off its layers, such as attention_type
            return getattr(self.__dict__["real"], name)
