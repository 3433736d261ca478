"""Folders that are not a checkpoint to prune, told apart in words."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from moe_fair.engines.shards import INDEX, SINGLE
from moe_fair.engines.stock import read_config

POINTER = b"version https://git-lfs.github.com/spec/"


def local_folder(model: str) -> Path | None:
    """The directory that a model's name stands for; None for a name on the Hub.

    Raises:
        ValueError: it is a path, and there is no such directory.
    """
    if Path(model).is_dir():
        return Path(model)
    if model.startswith((".", "/", "~")) or model.count("/") > 1 or Path(model).exists():
        raise ValueError(
            f"{model}: no such directory; give a model directory or a Hub id (user/name)"
        )
    return None


def check_folder(folder: Path) -> dict[str, Any]:
    """The folder may hold a transformers checkpoint.

    Returns:
        its `config.json` as it lies there.

    Raises:
        ValueError: it holds something else, or files that were not fetched; says what.
    """
    names = {p.name for p in folder.iterdir()}
    if "config.json" not in names:
        raise ValueError(f"{_what_else(folder, names)} (no config.json in {folder})")
    for name in sorted(n for n in names if n.endswith((".json", ".safetensors", ".bin"))):
        if is_pointer(folder / name):
            raise ValueError(
                f"{name} is a Git LFS pointer, not the file itself: run `git lfs pull` in the "
                "folder, or download the model with `hf download`"
            )
    config = read_config(folder)
    if isinstance(config.get("quantization"), dict) and "quantization_config" not in config:
        raise ValueError(
            "weights packed by MLX (`quantization` in config.json); prune the original model and "
            "convert the result with mlx_lm.convert"
        )
    return config


def other_weights(folder: Path) -> str | None:
    """What stands in the place of safetensors files beside a config; None where nothing does."""
    names = {p.name for p in folder.iterdir()}
    if "adapter_config.json" in names:
        return "an adapter (LoRA) without its base model; merge it into the base first"
    if any(n.endswith(".gguf") for n in names):
        return (
            "weights in GGUF files alone; prune the original safetensors model and convert the "
            "result"
        )
    shards = sorted(n for n in names if n.endswith(".safetensors") and "-of-" in n)
    if shards and INDEX not in names:
        return (
            f"{len(shards)} safetensors files ({shards[0]}, …) and no {INDEX} that says what lies "
            "in which; download it too"
        )
    others = sorted(n for n in names if n.endswith(".safetensors"))
    if others and INDEX not in names:
        return f"{others[0]}, and no {SINGLE} or {INDEX}; rename it, or write the index"
    return None


def is_pointer(file: Path) -> bool:
    """What Git LFS puts in a file's place until it is fetched."""
    try:
        with file.open("rb") as f:
            return f.read(len(POINTER)) == POINTER
    except OSError:
        return False


def _what_else(folder: Path, names: set[str]) -> str:
    if "adapter_config.json" in names:
        return "an adapter (LoRA), not a model; merge it into its base model first"
    if any(n.endswith(".gguf") for n in names):
        return (
            "GGUF files, which cannot be pruned; prune the original safetensors model and convert "
            "the result"
        )
    if "params.json" in names:
        return "the vendor's own layout (params.json); give the model in transformers' layout"
    inside = sorted(p.parent.name for p in folder.glob("*/config.json"))
    if inside:
        return f"not a model directory, but {inside[0]}/ in it is"
    return "is this a model directory?"
