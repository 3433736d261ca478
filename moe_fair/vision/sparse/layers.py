"""The layers whose single weights can go, and setting them to zero.

Convolutions and linear layers that run once in a forward. Within a layer the weights of largest
magnitude stay, equal ones by their place; a rule (`rules`) only says how many.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from moe_fair.vision.graph import CONVOLUTIONS, logits

DEAD = 1e-10  # a channel's variance over its mean square: below, it does not move


@dataclass(frozen=True)
class Layer:
    """One layer's weight.

    Attributes:
        name: module path.
        shape: of the weight: outputs, inputs (of one group), kernel.
        present: weights that are not zero yet; no more can be kept.
    """

    name: str
    shape: tuple[int, ...]
    present: int

    @property
    def size(self) -> int:
        """Number of weights."""
        return int(torch.Size(self.shape).numel())


@dataclass(frozen=True)
class Net:
    """What a rule may look at.

    Attributes:
        model: dense, in eval mode; a rule leaves it as it was.
        layers: those whose weights can go, in the model's order.
        images: [S, C, H, W] calibration images, without labels.
        batch_size: images in one forward, where they need not pass together.
        known: what was measured on it already, for rules that share it.
    """

    model: nn.Module
    layers: tuple[Layer, ...]
    images: Tensor
    batch_size: int = 64
    known: dict[Any, Any] = field(default_factory=dict, repr=False, compare=False)

    def batches(self) -> Iterator[Tensor]:
        """The images in batches, on the model's device."""
        device = next(self.model.parameters()).device
        for x in self.images.split(self.batch_size):
            yield x.to(device)


def find_layers(model: nn.Module, images: Tensor) -> tuple[tuple[Layer, ...], dict[str, str]]:
    """The layers to prune, and why others stay dense: name -> reason.

    Args:
        images: an example batch; run once.

    Raises:
        ValueError: there is none, or a weight is not finite.
    """
    found = {n: m for n, m in model.named_modules() if isinstance(m, (nn.Linear, *CONVOLUTIONS))}
    calls = _calls(model, found, images)
    owners = Counter(id(m.weight) for m in found.values() if "weight" in m._parameters)
    layers, dense = [], {}
    for name, m in found.items():
        if "weight" not in m._parameters:
            dense[name] = "its weight is computed from others"
        elif calls[name] == 0:
            dense[name] = "does not run as a layer of its own"
        elif calls[name] > 1:
            dense[name] = f"runs {calls[name]} times in a forward"
        elif owners[id(m.weight)] > 1:
            dense[name] = "shares its weight with another layer"
        else:
            w = m.weight.detach()
            if not bool(w.isfinite().all()):
                raise ValueError(f"{name}.weight holds values that are not finite")
            layers.append(Layer(name, tuple(w.shape), int(w.count_nonzero())))
    if not layers:
        raise ValueError("the model has no convolution or linear layer whose weights could go")
    return tuple(layers), dense


def keep_largest(model: nn.Module, kept: Mapping[str, int]) -> None:
    """Set all but so many weights of each layer to zero, in place."""
    with torch.no_grad():
        for name, count in kept.items():
            w = _weight(model, name)
            w.masked_fill_(~largest(w, count), 0)


def largest(weight: Tensor, count: int) -> Tensor:
    """Mask, bool, of the `count` weights of largest magnitude, equal ones by their place."""
    flat = weight.detach().abs().flatten()
    assert 0 <= count <= len(flat)
    if count == 0:
        return torch.zeros_like(weight, dtype=torch.bool)
    border = flat.kthvalue(len(flat) - count + 1).values
    mask = flat > border
    ties = (flat == border).nonzero().flatten()
    mask[ties[: count - int(mask.sum())]] = True
    return mask.view(weight.shape)


def zeros(model: nn.Module, layers: Sequence[Layer]) -> dict[str, int]:
    """Weights of each layer that are zero."""
    return {x.name: x.size - int(_weight(model, x.name).count_nonzero()) for x in layers}


@contextmanager
def hooked(model: nn.Module, hooks: Mapping[str, object]) -> Iterator[None]:
    """Forward hooks on layers by name; taken off at the end, the model in eval mode meanwhile."""
    training = model.training
    model.eval()
    handles = [
        model.get_submodule(n).register_forward_hook(h)  # type: ignore[arg-type]
        for n, h in hooks.items()
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
        model.train(training)


def _weight(model: nn.Module, name: str) -> Tensor:
    weight = model.get_submodule(name).weight
    assert isinstance(weight, Tensor)
    return weight


def _calls(model: nn.Module, layers: Mapping[str, nn.Module], images: Tensor) -> Counter[str]:
    counts: Counter[str] = Counter()

    def count(name: str):  # type: ignore[no-untyped-def]
        return lambda *_: counts.update([name])

    device = next(model.parameters()).device
    with hooked(model, {n: count(n) for n in layers}), torch.no_grad():
        logits(model, images.to(device))
    return counts
