"""Pruned image models on disk: weights, how the base is built, and the cuts that lead from it.

    model.safetensors      the remaining weights
    pruned.json            the base architecture, the history of cuts, the preprocessing
    config.json, preprocessor_config.json    of a transformers model, as the original had them

`load_pruned` builds the base, repeats the cuts and fills in the weights; nothing is unpickled and
Torch-Pruning is not needed.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from safetensors.torch import save_file
from torch import nn

from moe_fair.vision.load import Source, build, find_processor, load_weights, once, processed
from moe_fair.vision.preprocessing import Preprocessing, Transform, called
from moe_fair.vision.surgery import Cut, cut

PRUNED_FILE = "pruned.json"
WEIGHTS_FILE = "model.safetensors"
FORMAT = "moe_fair.vision/1"


def save_pruned(
    model: nn.Module, source: Source, history: Sequence[Sequence[Cut]], folder: Path
) -> None:
    """Write a pruned model into an existing folder.

    Args:
        source: what the model was made from.
        history: every step's cuts, from the base architecture to this model.
    """
    tensors = {n: t.detach().cpu().contiguous() for n, t in once(model.state_dict()).items()}
    save_file(tensors, folder / WEIGHTS_FILE, {"format": "pt"})
    (folder / WEIGHTS_FILE).chmod(0o644)
    if source.base["kind"] == "transformers":
        model.config.save_pretrained(folder)  # type: ignore[union-attr, operator]
    if source.processor is not None:
        source.processor.save_pretrained(folder)
    record = {
        "format": FORMAT,
        "base": source.base,
        "history": [[list(c) for c in step] for step in history],
        "preprocessing": asdict(source.preprocessing) if source.preprocessing else None,
        "labels": source.labels,
        **({"transforms": source.transforms} if source.transforms else {}),
    }
    (folder / PRUNED_FILE).write_text(json.dumps(record, indent=None, sort_keys=True) + "\n")


def load_pruned(path: str | Path, *, trust_remote_code: bool = False) -> nn.Module:
    """The pruned model of a folder, in eval mode.

    Args:
        trust_remote_code: call the model function that the folder names even where it is not one of
            moe_fair, torchvision or timm.

    Raises:
        ValueError: no pruned model there, or one that cannot be built.
    """
    return open_pruned(Path(path), trust_remote_code=trust_remote_code).model


def open_pruned(folder: Path, *, trust_remote_code: bool = False) -> Source:
    """The pruned model with what belongs to it; see `load_pruned`."""
    record = read_record(folder)
    model = build(record["base"], trusted=trust_remote_code, folder=folder)
    history = tuple(
        [(str(m), str(s), list(ids)) for m, s, ids in step] for step in record["history"]
    )
    for step in history:
        cut(model, step)
    load_weights(model, folder / WEIGHTS_FILE)
    labels = tuple(record["labels"]) if record["labels"] else None
    transforms = record.get("transforms")
    if transforms:
        transform = called(transforms) if trust_remote_code else _refusing(folder, transforms)
        return Source(
            model.eval(), record["base"], transform, None, None, labels, history, transforms
        )
    if record["preprocessing"]:
        numbers: dict[str, Any] = dict(record["preprocessing"])
        own = Preprocessing(
            **{**numbers, "mean": tuple(numbers["mean"]), "std": tuple(numbers["std"])}
        )
        return Source(model.eval(), record["base"], own, own, None, labels, history)
    processor = find_processor(str(folder), trusted=trust_remote_code)
    if processor is None:
        raise ValueError(f"{folder} has neither preprocessing nor an image processor")
    transform = processed(processor)
    return Source(model.eval(), record["base"], transform, None, processor, labels, history)


def _refusing(folder: Path, transforms: dict[str, Any]) -> Transform:
    """In place of code that nobody has allowed: the model can be had without it."""

    def transform(_: Any) -> Any:
        raise ValueError(
            f"{folder} has its pictures made ready by {transforms['module']}:"
            f"{transforms['function']}; if you know that code, load it with trust_remote_code=True"
        )

    return transform


def read_record(folder: Path) -> dict[str, Any]:
    """`pruned.json`: base, history, preprocessing and labels.

    Raises:
        ValueError: no such file, or another version's.
    """
    file = folder / PRUNED_FILE
    if not file.is_file():
        raise ValueError(f"no pruned image model at {folder}; `moe-fair vision prune` makes one")
    try:
        record = json.loads(file.read_text())
        if record["format"] != FORMAT:
            raise ValueError(f"format {record['format']!r}, expected {FORMAT!r}")
        if record["base"]["kind"] not in ("transformers", "function"):
            raise ValueError(f"unknown base {record['base']['kind']!r}")
        record["history"], record["preprocessing"], record["labels"]
    except (ValueError, KeyError, TypeError) as e:
        raise ValueError(f"{file} is not a record of cuts that this version reads: {e}") from e
    return dict(record)
