"""A model with its weights, filled by transformers from a checkpoint's files."""

from __future__ import annotations

import copy
import shutil
import tempfile
import weakref
from contextlib import ExitStack
from pathlib import Path
from typing import Any, Protocol

import torch
from safetensors import safe_open
from transformers import GenerationConfig

from moe_fair.engines.auto import auto_class
from moe_fair.engines.packing import QUANTISED, Packing
from moe_fair.moe.device_map import check_map, read_map, without_overlap


class Files(Protocol):
    """What is needed of a `Checkpoint`, which imports this module."""

    model: str
    config: Any
    brings_model: bool

    @property
    def path(self) -> Path: ...

    @property
    def shards(self) -> list[Path]: ...

    @property
    def skeleton(self) -> torch.nn.Module: ...

    @property
    def packing(self) -> Packing | None: ...


def load_model(source: Files, dtype: torch.dtype | str, **more: Any) -> Any:
    """The model, filled by transformers from the files, or from weights unpacked as it asks."""
    if source.packing is not None:
        return _unpacked(source, source.packing, dtype, **more)
    model, info = auto_class(source.config).from_pretrained(
        source.path,
        config=copy.deepcopy(source.config),
        dtype=dtype,
        trust_remote_code=source.brings_model,
        use_safetensors=True,
        output_loading_info=True,
        **more,
    )
    _check_whole(source, info)
    return model


def _unpacked(source: Files, packing: Packing, dtype: torch.dtype | str, **more: Any) -> Any:
    config = plain_config(source.config)
    if isinstance(dtype, str):  # transformers would look for it in tensors that are none yet
        dtype = config.get_text_config().dtype or config.dtype or torch.bfloat16
    with ExitStack() as files:
        state: dict[str, Any] = {}
        for shard in source.shards:
            f = files.enter_context(safe_open(str(shard), framework="pt", device="cpu"))
            state |= {name: f.get_slice(name) for name in f.keys()}  # noqa: SIM118
        kind: Any = type(source.skeleton)
        model, info = kind.from_pretrained(
            None,
            config=config,
            state_dict=packing.unpacked(state),
            dtype=dtype,
            output_loading_info=True,
            **more,
        )
    _check_whole(source, info)
    if (source.path / "generation_config.json").is_file():
        model.generation_config = GenerationConfig.from_pretrained(source.path)
    return model


def _check_whole(source: Files, info: dict[str, Any]) -> None:
    """Nothing was made up: transformers fills what is missing with random numbers."""
    if missing := sorted(info["missing_keys"]):
        raise ValueError(
            f"{source.model}: its files hold no {missing[0]} ({len(missing)} tensors missing), "
            "which would be random numbers; download or copy it again"
        )


def spread_model(source: Files, dtype: torch.dtype | str, device_map: str) -> Any:
    """The model over the devices of a map; what goes to disk lies in a temporary directory."""
    places = read_map(device_map)
    if isinstance(places, dict):
        check_map(device_map, places, source.skeleton)
        places = without_overlap(places, source.skeleton)
    folder = tempfile.mkdtemp(prefix="moe_fair-offload-")
    model = load_model(source, dtype, device_map=places, offload_folder=folder)
    weakref.finalize(model, shutil.rmtree, folder, True)
    return model


def plain_config(config: Any) -> Any:
    """The config of the same model with weights that are not packed."""
    plain = copy.deepcopy(config)
    for part in {id(p): p for p in (plain, plain.get_text_config())}.values():
        for name in QUANTISED:
            vars(part).pop(name, None)
    return plain
