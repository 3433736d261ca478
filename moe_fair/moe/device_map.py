"""`--device-map`: which device holds which part of one process's model, and what is offloaded.

accelerate moves an offloaded part's weights to where they compute and drops them after its forward.
The gradient goes through it all the same: each decoder layer's forward is run again in the backward
(checkpointing), so that one layer's weights and activations are there at a time.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import nn

from moe_fair.core.quote import quote
from moe_fair.core.yaml_file import read_yaml

Place = str | int
NAMED = ("auto", "balanced")


def read_map(given: str) -> str | dict[str, Place]:
    """`auto`, `balanced`, or the mapping in a JSON or YAML file: module path -> device.

    Raises:
        ValueError: no such file, or it holds no mapping to devices.
    """
    if given in NAMED:
        return given
    path = Path(given)
    if not path.is_file():
        raise ValueError(f"--device-map {given}: neither auto nor balanced nor a file")
    try:
        found = read_yaml(path)  # JSON is YAML
    except ValueError as e:
        raise ValueError(f"--device-map: {e}") from e
    if not isinstance(found, dict) or not found:
        raise ValueError(f'--device-map {given}: write module: device, as "model.layers.0": 0')
    for module, place in found.items():
        if not isinstance(module, str) or not isinstance(place, (str, int)):
            raise ValueError(
                f"--device-map {given}: {quote(module)}: {quote(place)} names no device"
            )
        _check_place(given, module, place)
    return found


def _check_place(given: str, module: str, place: Place) -> None:
    if place == "disk":
        return
    try:
        device = torch.device(place)
    except RuntimeError as e:
        raise ValueError(f"--device-map {given}: {module}: {place!r} is no device") from e
    count = torch.accelerator.device_count() if torch.accelerator.is_available() else 0
    if device.type != "cpu" and (device.index or 0) >= count:
        raise ValueError(
            f"--device-map {given}: {module}: {place!r} is not among this machine's {count} "
            "accelerators; cpu and disk always are"
        )


def check_map(given: str, found: str | Mapping[str, Place], skeleton: nn.Module) -> None:
    """Every module of the mapping is the model's, and every weight has a place.

    Raises:
        ValueError: names the first that does not fit.
    """
    if isinstance(found, str):
        return
    names = {n for n, _ in skeleton.named_modules()}
    for module in found:
        if module not in names:
            raise ValueError(f"--device-map {given}: the model has no module {module!r}")
    for name, _ in skeleton.named_parameters():
        if not any(m == "" or name == m or name.startswith(m + ".") for m in found):
            raise ValueError(
                f'--device-map {given}: no device for {name}; "": cpu places what is not named'
            )


def check_resident(given: str | None) -> None:
    """A mapping keeps every weight where it computes: what is trained is not offloaded.

    Raises:
        ValueError: names the first that it does not; `auto` is known once the model is loaded.
    """
    found = {} if given is None else read_map(given)
    if isinstance(found, str):
        return
    outside = ("disk", "cpu") if torch.accelerator.is_available() else ("disk",)
    for module, place in found.items():
        if place in outside:
            raise ValueError(
                f"--heal: --device-map {given} leaves {module or 'the model'} on {place}, and all "
                "weights are trained on devices; place it on one, or leave --heal out"
            )


def without_overlap(found: Mapping[str, Place], model: nn.Module, at: str = "") -> dict[str, Place]:
    """The mapping with every module named once: accelerate takes no place within another's.

    Args:
        found: module path -> device; the longest path that fits a module decides.
        model: the module that lies at path `at`.
    """
    prefix = at + "." if at else ""
    if not any(key != at and key.startswith(prefix) for key in found):
        fits = [key for key in found if key == at or key == "" or at.startswith(key + ".")]
        return {at: found[max(fits, key=len)]} if fits else {}
    places: dict[str, Place] = {}
    for name, child in model.named_children():
        places |= without_overlap(found, child, prefix + name)
    for name in (*model._parameters, *model._buffers):
        places |= without_overlap(found, nn.Identity(), prefix + name)
    return places


def offloaded(model: nn.Module) -> bool:
    """Some weights come to their device only while they compute."""
    return any(p.is_meta for p in model.parameters())


def placement(model: nn.Module) -> str:
    """How the parts lie, for the screen."""
    found: Mapping[str, Place] = getattr(model, "hf_device_map", {})
    parts = [f"{n} on {place}" for place, n in Counter(map(str, found.values())).items()]
    text = f"device map: modules {', '.join(parts)}" if parts else "device map: all on one device"
    if offloaded(model):
        text += (
            "; offloaded weights are read again for every batch and each layer runs twice: "
            "--engine streaming reads a layer once for all batches of a chunk"
        )
    return text
