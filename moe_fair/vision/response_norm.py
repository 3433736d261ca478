"""Global response normalisation (ConvNeXt V2, arXiv 2301.00808), known by what it computes.

    y = γ·x·n + β + x,   n_c = g_c / (mean over channels of g + ε),   g_c = ‖x_c‖ over a map

A unit that is silenced only where it is read would still have its part in the mean. So it is
silenced before the normalisation as well (`gates`), where it adds nothing to the sum over C
channels; the k that a cut leaves have the same sum, divided by k. With γ and ε both times C/k the
cut layer gives the same numbers, exactly. An ε that stands in the code cannot follow: then n
differs by the share (C/k - 1)·ε/mean g, which for the usual 1e-6 is less than float32 rounds.

Shape legend: C channels, k of them kept.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import permutations
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from moe_fair.vision.layer_input import given, with_input

# inputs beside which an ε disappears, and the most that an ε is
LARGE, MOST_EPSILON = 2.0**20, 1e-2
SAME = 1e-9


@dataclass(frozen=True)
class ResponseNorm:
    """A layer of this kind.

    Attributes:
        channels: C.
        scale, shift: names of γ and β; there may be no β.
        epsilon: name of the attribute that is ε; None where it stands in the code.
        axis: of the input along which channels lie, from its end.
    """

    channels: int
    scale: str
    shift: str | None
    epsilon: str | None
    axis: int


_known: WeakKeyDictionary[nn.Module, ResponseNorm | None] = WeakKeyDictionary()


def response_norm(layer: nn.Module) -> ResponseNorm | None:
    """What is known of a layer that computes this; None of any other."""
    if layer not in _known:
        _known[layer] = _recognised(layer)
    found = _known[layer]
    if found is not None and getattr(layer, found.scale).numel() != found.channels:  # cut since
        found = _known[layer] = _recognised(layer)
    return found


def response_norms(model: nn.Module) -> Iterator[tuple[str, nn.Module, ResponseNorm]]:
    """Name, layer and what is known of all such layers of a model."""
    for name, layer in model.named_modules():
        if (found := response_norm(layer)) is not None:
            yield name, layer, found


def cut_response_norm(layer: nn.Module, found: ResponseNorm, kept: Tensor) -> None:
    """Leave the kept channels, in place: [k] positions."""
    more = found.channels / len(kept)
    for name in filter(None, (found.scale, found.shift)):
        old: Tensor = getattr(layer, name)
        axis = old.shape.index(found.channels)
        new = old.detach().index_select(axis, kept.to(old.device))
        new = new * more if name == found.scale else new.clone()
        setattr(layer, name, nn.Parameter(new, requires_grad=old.requires_grad))
    if found.epsilon is not None:
        setattr(layer, found.epsilon, getattr(layer, found.epsilon) * more)


def enlarge(layer: nn.Module) -> float:
    """Run a response normalisation on larger numbers, beside which its ε is nothing; returns how
    much larger. A cut cannot change an ε that stands in the code, and what else it does wrong must
    show as it does elsewhere."""
    layer.register_forward_pre_hook(_larger, with_kwargs=True)
    layer.register_forward_hook(_smaller)
    return LARGE


def _larger(_: nn.Module, inputs: tuple, named: dict) -> tuple[tuple, dict]:
    return with_input(inputs, named, given(inputs, named) * LARGE)


def _smaller(_: nn.Module, __: object, out: Tensor) -> Tensor:
    return out / LARGE


def _recognised(layer: nn.Module) -> ResponseNorm | None:
    parameters = dict(layer.named_parameters(recurse=False))
    sizes = {p.numel() for p in parameters.values()}
    inside = [*layer.children(), *layer.buffers()]
    if not 1 <= len(parameters) <= 2 or len(sizes) != 1 or inside:
        return None
    [count] = sizes
    vectors = all(max(p.shape, default=0) == count for p in parameters.values())
    if type(layer).__module__.startswith("torch.") or count < 2 or not vectors:
        return None
    try:
        own = copy.deepcopy(layer).to("cpu", torch.float64).eval().requires_grad_(False)
        return _as_computed(own, count)
    except Exception:  # whatever another module's code raises on what it does not take
        return None


def _as_computed(own: nn.Module, count: int) -> ResponseNorm | None:
    generator = torch.Generator().manual_seed(0)
    for p in own.parameters():
        p.copy_(torch.rand(p.shape, generator=generator, dtype=p.dtype) + 0.5)
    sides = (2, 3) if count > 3 else (5, 7)
    names: list[str | None] = [n for n, _ in own.named_parameters()]
    names += [None] * (2 - len(names))
    for axis in (-1, -3):
        x = LARGE * torch.randn(2, *sides, count, generator=generator, dtype=torch.float64)
        x = x.movedim(-1, axis)
        y = _run(own, x)
        for scale, shift in permutations(names):
            if scale is None:
                continue
            found = ResponseNorm(count, scale, shift, None, axis)
            if _same(y, _formula(own, found, x, 0.0)):
                return ResponseNorm(count, scale, shift, _epsilon(own, found, x), axis)
    return None


def _run(own: nn.Module, x: Tensor) -> object:
    """What it makes of `x`; None where it has its channels elsewhere."""
    try:
        return own.forward(x)
    except Exception:  # another module's code raises what it likes
        return None


def _epsilon(own: nn.Module, found: ResponseNorm, x: Tensor) -> str | None:
    """The attribute of which the result depends as it does on ε."""
    for name, value in list(vars(own).items()):
        if type(value) is float and 0 < value <= MOST_EPSILON:
            setattr(own, name, LARGE)
            if _same(own.forward(x), _formula(own, found, x, LARGE)):
                return name
            setattr(own, name, value)
    return None


def _formula(own: nn.Module, found: ResponseNorm, x: Tensor, epsilon: float) -> Tensor:
    x = x.movedim(found.axis, -1)
    g = x.square().sum((1, 2), keepdim=True).sqrt()
    n = g / (g.mean(-1, keepdim=True) + epsilon)
    y = getattr(own, found.scale).flatten() * x * n + x
    if found.shift is not None:
        y = y + getattr(own, found.shift).flatten()
    return y.movedim(-1, found.axis)


def _same(a: object, b: Tensor) -> bool:
    return (
        isinstance(a, Tensor)
        and a.shape == b.shape
        and float((a - b).abs().max()) <= SAME * float(b.abs().max())
    )
