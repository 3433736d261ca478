"""The weights of a model that healing changes, and a checkpoint's bytes of them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import torch
from torch import Tensor, nn

from moe_fair.engines.decoder import find_decoder
from moe_fair.engines.shards import StoredTensor
from moe_fair.engines.stored_values import read_tensor
from moe_fair.moe.checkpoint_source import Checkpoint
from moe_fair.moe.overlay import TYPES, UnknownLayoutError


def healed_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """Name -> every weight of the decoder layers; embeddings and output matrix stay.

    Raises:
        ValueError: the model has no plain list of decoder layers.
    """
    own = {id(p) for p in find_decoder(model).layers.parameters()}
    return {n: p for n, p in model.named_parameters() if id(p) in own and p.is_floating_point()}


def check_healable(source: Checkpoint) -> None:
    """New values of the weights that healing changes can be written, by the checkpoint's headers.

    Raises:
        ValueError: they cannot.
    """
    advice = "; leave --heal out"
    if source.packing is not None:
        raise ValueError(
            f"--heal: the weights of {source.model} are packed ({source.packing.scheme.name}), and "
            f"only those that are not are trained end to end{advice}"
        )
    weights = healed_parameters(source.skeleton)
    for t, name in _stored(source, weights):
        try:
            _as_stored(source, t, weights[name].detach())
        except UnknownLayoutError as e:
            raise ValueError(f"--heal: {e}{advice}") from e


def check_stored(source: Checkpoint, weights: Mapping[str, Tensor]) -> None:
    """The checkpoint's bytes are these weights.

    Raises:
        UnknownLayoutError: they are not: it keeps a tensor in another layout than the model.
    """
    for t, name in _stored(source, weights):
        stored = read_tensor(t)
        if not torch.equal(_as_stored(source, t, weights[name]), stored):
            raise UnknownLayoutError(f"{t.name} is kept in another layout than in the model")


def write_over(source: Checkpoint, weights: Mapping[str, Tensor]) -> None:
    """Put these weights in the place of a checkpoint's own: names, shapes and types stay.

    Raises:
        UnknownLayoutError: a layout that is not known; nothing is written then.
    """
    found = list(_stored(source, weights))
    for t, name in found:
        _as_stored(source, t, weights[name])
    for t, name in found:
        new = _as_stored(source, t, weights[name]).reshape(-1).view(torch.uint8)
        [piece] = t.pieces
        with piece.file.open("r+b") as f:
            f.seek(piece.start)
            f.write(new.numpy().tobytes())


def _stored(
    source: Checkpoint, weights: Mapping[str, Tensor]
) -> Iterator[tuple[StoredTensor, str]]:
    """Every stored tensor of these weights, and the weight's name in the model."""
    for t in source.tensors:
        name = source.find(t.name).name
        if name in weights:
            yield t, name


def _as_stored(source: Checkpoint, t: StoredTensor, weight: Tensor) -> Tensor:
    """What a checkpoint keeps under a name, of the weight in the model.

    Raises:
        UnknownLayoutError: it keeps it in an unknown layout or type.
    """
    where, part = source.find(t.name), source.parts.get(t.name)
    if t.dtype not in TYPES:
        raise UnknownLayoutError(f"{t.name} is {t.dtype}, in which no new values are written")
    if where.part is not None and part is not None and part.expert is not None:
        weight = weight[part.expert].chunk(where.parts)[where.part]
    try:
        stored = weight if where.part is not None else where.stored(weight, t.shape)
    except ValueError as e:
        raise UnknownLayoutError(str(e)) from e
    if tuple(stored.shape) != t.shape:
        raise UnknownLayoutError(f"{t.name} is kept in another shape than in the model")
    return stored.to(TYPES[t.dtype]).contiguous()
