"""Digests of a model and its images, by which a run knows what an earlier one has left."""

from __future__ import annotations

import hashlib
import inspect
import json
import sys
from pathlib import Path

import torch
from torch import nn

from moe_fair.vision.data import Data, ImageSet
from moe_fair.vision.load import Source

BATCH = 64
SAMPLED = 2048  # images of a part that are looked at; a larger one's are evenly spread


def identity(source: Source, data: Data) -> dict[str, str]:
    """What the results of a run depend on beside its settings.

    Returns:
        digests of the weights, of the code that the model runs, and of the images as the model is
        given them, with their labels.
    """
    images = hashlib.sha256()
    for part in (data.train, data.test):
        images.update(_images(part))
    return {
        "weights": _weights(source.model),
        "code": _code(source),
        "images": images.hexdigest(),
    }


def _weights(model: nn.Module) -> str:
    digest = hashlib.sha256()
    for name, tensor in model.state_dict().items():
        if isinstance(tensor, torch.Tensor):  # a module may keep other state there
            digest.update(f"{name} {tensor.dtype} {list(tensor.shape)} ".encode())
            digest.update(_bytes(tensor))
    return digest.hexdigest()


def _code(source: Source) -> str:
    """Of the files that define the model's function and its modules' classes, but torch's own."""
    digest = hashlib.sha256(json.dumps([source.base, source.history], sort_keys=True).encode())
    names = {type(m).__module__ for m in source.model.modules()}
    for part in (source.base, source.transforms or {}):
        names |= {str(part["module"])} if "module" in part else set()
    for name in sorted(names):
        file = None if name.startswith("torch.") else _file(name)
        if file is not None:
            digest.update(name.encode() + file.read_bytes())
    return digest.hexdigest()


def _file(module: str) -> Path | None:
    """Where a module that is imported was read from; None for one without a file."""
    try:
        found = inspect.getsourcefile(sys.modules[module])
    except (KeyError, TypeError):
        return None
    return Path(found) if found is not None and Path(found).is_file() else None


def _images(part: ImageSet) -> bytes:
    count = len(part)
    taken = min(count, SAMPLED)
    digest = hashlib.sha256(json.dumps([count, part.classes]).encode())
    digest.update(_bytes(part.labels))
    for images, _ in part.batches(BATCH, [i * count // taken for i in range(taken)]):
        for image in images:
            digest.update(_bytes(image))
    return digest.digest()


def _bytes(tensor: torch.Tensor) -> bytes:
    return tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()
