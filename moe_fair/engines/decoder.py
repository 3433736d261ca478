"""Where the decoder layers of a model lie, whatever it calls them and whatever is around them."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

from torch import Tensor, nn


class Decoder(NamedTuple):
    """The list of decoder layers and its surroundings.

    Attributes:
        entry: the smallest module that takes token ids and calls the layers as the model does.
        holder, name: the module that has the list as an attribute, and the attribute.
    """

    entry: nn.Module
    holder: nn.Module
    name: str

    @property
    def layers(self) -> nn.ModuleList:
        """The decoder layers."""
        found = getattr(self.holder, self.name)
        assert isinstance(found, nn.ModuleList)
        return found


def find_decoder(model: Any) -> Decoder:
    """The text decoder of a causal or multimodal language model.

    Raises:
        ValueError: there is no plain list of decoder layers.
    """
    base, text = model.base_model, model.get_decoder()
    for holder in (base, text):
        if isinstance(getattr(holder, "layers", None), nn.ModuleList):
            return Decoder(base if base is not model else holder, holder, "layers")
    depth = model.config.get_text_config().num_hidden_layers
    for holder in text.modules():
        for name, child in holder.named_children():
            if isinstance(child, nn.ModuleList) and len(child) == depth:
                return Decoder(base if base is not model else holder, holder, name)
    raise ValueError(f"{type(model).__name__} has no list of {depth} decoder layers")


def final_norm(model: Any) -> nn.Module:
    """The norm between the last decoder layer and the output matrix.

    Raises:
        ValueError: there is not one such module, or the output matrix is elsewhere.
    """
    text = model.get_decoder()
    found = [m for n, m in text.named_children() if "norm" in n.lower()]
    if len(found) != 1 or not isinstance(model.get_output_embeddings(), nn.Linear):
        raise ValueError(f"{type(model).__name__} has no plain norm and output matrix at its end")
    return found[0]


@contextmanager
def last_hidden_states(model: Any) -> Iterator[list[Tensor]]:
    """What the final norm gives while this is entered: [B, L, D] a forward, without gradient."""
    found: list[Tensor] = []
    hook = final_norm(model).register_forward_hook(
        lambda module, inputs, output: found.append(output.detach())
    )
    try:
        yield found
    finally:
        hook.remove()
