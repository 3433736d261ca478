"""What makes a model's input of a picture: our own numbers, published ones, or the user's code.

timm          what `timm.data` resolves of the model's own configuration
torchvision   what belongs to the weights that `torchvision.models:resnet50(weights='DEFAULT')`
              names
--transforms  module:function, called once, gives a function of a PIL image
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from moe_fair.vision.pictures import converted

Transform = Callable[[Any], Tensor]
RESAMPLE = ("bilinear", "bicubic", "nearest", "lanczos", "box", "hamming")


@dataclass(frozen=True)
class Preprocessing:
    """PIL image -> [C, H, W] float32: resized, cropped, scaled to 0..1, normalised per channel.

    Attributes:
        crop: share of the resized picture's side that is kept, from its middle.
        squash: both sides are resized to the same; else the shorter one, the other in proportion.
        resample: one of `RESAMPLE`.
    """

    channels: int
    size: int
    mean: tuple[float, ...] = (0.5,)
    std: tuple[float, ...] = (0.5,)
    crop: float = 1.0
    squash: bool = True
    resample: str = "bilinear"

    def __post_init__(self) -> None:
        for name, values in (("--mean", self.mean), ("--std", self.std)):
            if len(values) not in (1, self.channels):
                raise ValueError(
                    f"{name} has {len(values)} values; the model has {self.channels} channels"
                )
            if not np.isfinite(values).all():
                raise ValueError(f"{name} must be finite numbers")
        if min(self.std) <= 0:
            raise ValueError(f"--std {min(self.std)} is not above 0")
        if not 0 < self.crop <= 1:
            raise ValueError(f"a crop of {self.crop:g} is not above 0 and at most 1")
        if self.resample not in RESAMPLE:
            raise ValueError(f"no resampling {self.resample!r}; there are {', '.join(RESAMPLE)}")

    def __call__(self, image: Any) -> Tensor:
        image = self._sized(converted(image, "L" if self.channels == 1 else "RGB"))
        pixels = torch.from_numpy(np.array(image, dtype=np.float32) / 255)
        pixels = pixels[None] if pixels.dim() == 2 else pixels.permute(2, 0, 1)
        mean, std = (torch.tensor(v)[:, None, None] for v in (self.mean, self.std))
        return (pixels - mean) / std

    def _sized(self, image: Any) -> Any:
        """The middle square of `size`, as torchvision's Resize and CenterCrop give it."""
        from PIL import Image

        side = int(self.size / self.crop)
        width, height = (side, side) if self.squash else _in_proportion(image.size, side)
        image = image.resize((width, height), Image.Resampling[self.resample.upper()])
        left, top = (round((n - self.size) / 2) for n in (width, height))
        return image.crop((left, top, left + self.size, top + self.size))


def _in_proportion(size: tuple[int, int], side: int) -> tuple[int, int]:
    width, height = size
    if width <= height:
        return side, int(side * height / width)
    return int(side * width / height), side


def published(model: nn.Module, base: Mapping[str, Any]) -> dict[str, Any]:
    """Fields of `Preprocessing` that timm or torchvision has for its model; none for others.

    Args:
        base: how the model was built, as in `Source`.

    Raises:
        ValueError: pictures that are cropped in a way that is not known here.
    """
    if type(model).__module__.startswith("timm."):
        return _timm(model)
    if base.get("module") == "torchvision.models" and base["keywords"].get("weights"):
        return _torchvision(str(base["function"]), base["keywords"]["weights"])
    return {}


def _timm(model: nn.Module) -> dict[str, Any]:
    from timm.data import resolve_model_data_config

    found = resolve_model_data_config(model)
    if found["crop_mode"] not in ("center", "squash"):
        raise ValueError(
            f"timm crops this model's pictures by {found['crop_mode']!r}; give a function with "
            "--transforms module:function"
        )
    return {
        "size": int(found["input_size"][-1]),
        "mean": tuple(map(float, found["mean"])),
        "std": tuple(map(float, found["std"])),
        "crop": float(found["crop_pct"]),
        "squash": found["crop_mode"] == "squash",
        "resample": found["interpolation"],
    }


def _torchvision(function: str, weights: Any) -> dict[str, Any]:
    from torchvision.models import get_model_weights, get_weight

    known = "." in str(weights)
    chosen = get_weight(weights) if known else get_model_weights(function)[str(weights)]
    its = chosen.transforms()
    [size], [resized] = its.crop_size, its.resize_size
    return {
        "size": size, "mean": tuple(its.mean), "std": tuple(its.std), "squash": False,
        "crop": size / resized, "resample": its.interpolation.value,
    }  # fmt: skip


def called(spec: Mapping[str, Any]) -> Transform:
    """What the function of `--transforms` gives.

    Args:
        spec: its parts, as `load.parse_function` gives them.

    Raises:
        ValueError: there is no such function, or what it gives is none.
    """
    name = f"{spec['module']}:{spec['function']}"
    try:
        function = getattr(importlib.import_module(spec["module"]), spec["function"])
    except (ImportError, AttributeError) as e:
        raise ValueError(f"--transforms {name}: {e}") from e
    try:
        transform = function(*spec["arguments"], **spec["keywords"])
    except TypeError as e:
        raise ValueError(f"--transforms {name}: {e}") from e
    if not callable(transform):
        raise ValueError(
            f"--transforms {name} gives {type(transform).__name__}; it must give a function that "
            "makes a tensor [channels, height, width] of a PIL image"
        )

    def checked(image: Any) -> Tensor:
        made = transform(image)
        if not isinstance(made, Tensor) or made.dim() != 3 or not made.is_floating_point():
            found = f"{made.dtype} {list(made.shape)}" if isinstance(made, Tensor) else type(made)
            raise ValueError(
                f"--transforms {name}: makes {found} of a picture; it must make a tensor of floats "
                "[channels, height, width]"
            )
        return made

    return checked
