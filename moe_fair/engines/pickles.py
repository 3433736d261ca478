"""Checkpoints that were pickled, read without running anything, and stored as safetensors.

A pickle is a program. `torch.load(weights_only=True)` runs it with a list of what it may call:
tensors and plain containers, nothing else. It is done once, a file at a time, into a temporary
directory: what comes after sees safetensors, whichever engine runs and whatever is cut.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import struct
import tempfile
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from moe_fair.engines.shards import INDEX, SINGLE, indexed

PICKLE_INDEX = "pytorch_model.bin.index.json"
PICKLE = "pytorch_model.bin"
WEIGHTS = (
    ".bin",
    ".safetensors",
    ".index.json",
    ".pt",
    ".pth",
    ".ckpt",
    ".msgpack",
    ".h5",
    ".gguf",
)
NAMES = {
    torch.bool: "BOOL", torch.uint8: "U8", torch.int8: "I8", torch.float8_e5m2: "F8_E5M2",
    torch.float8_e4m3fn: "F8_E4M3", torch.int16: "I16", torch.float16: "F16",
    torch.bfloat16: "BF16", torch.int32: "I32", torch.float32: "F32", torch.int64: "I64",
    torch.float64: "F64",
}  # fmt: skip
PIECE = 2**26  # bytes written at a time


def pickle_files(folder: Path) -> list[Path]:
    """The pickled weights of a checkpoint; none where it has no such files.

    Raises:
        ValueError: one is missing, or the index points outside the folder.
    """
    index = folder / PICKLE_INDEX
    names = indexed(index) if index.is_file() else [PICKLE]
    found = [folder / n for n in names]
    if not index.is_file() and not found[0].is_file():
        return []
    for file in found:
        if not file.is_file():
            raise ValueError(f"{folder}: {file.name} is missing; download or copy it again")
    return found


def convert(folder: Path) -> Path:
    """A temporary directory with the same checkpoint in safetensors, for the caller to remove.

    What else lies in the folder is linked. Tensors that share memory are stored each for itself.

    Raises:
        ValueError: a file that holds more than tensors, a tensor that lies in two files, or no room
            on the disk.
    """
    files = pickle_files(folder)
    home = Path(tempfile.mkdtemp(prefix="moe_fair-unpickled-"))
    try:
        _check_room(folder, home, sum(f.stat().st_size for f in files))
        for entry in folder.iterdir():
            if not entry.name.endswith(WEIGHTS):
                (home / entry.name).symlink_to(entry.absolute())
        where: dict[str, str] = {}
        for i, file in enumerate(files, 1):
            name = SINGLE if len(files) == 1 else f"model-{i:05d}-of-{len(files):05d}.safetensors"
            tensors = read(file)
            for twice in tensors.keys() & where.keys():
                raise ValueError(f"{folder}: {twice} lies in two of its pickles; which one counts?")
            _check_room(folder, home, sum(t.nbytes for t in tensors.values()))
            _write(home / name, tensors)
            where |= dict.fromkeys(tensors, name)
        if len(files) > 1:
            (home / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": where}))
    except BaseException:
        shutil.rmtree(home, ignore_errors=True)
        raise
    return home


def _check_room(folder: Path, home: Path, need: int) -> None:
    free = shutil.disk_usage(home).free
    if need > free:
        raise ValueError(
            f"{folder}: its pickles are stored as safetensors for the run, which needs "
            f"{need / 1e9:.1f} GB, and {free / 1e9:.1f} GB are free in {home.parent}; make room "
            "there, or set TMPDIR to another directory"
        )


def read(file: Path) -> dict[str, Tensor]:
    """The tensors of a pickled state dict by name; nothing of it is run.

    Raises:
        ValueError: it asks for anything but tensors, or is no flat table of them.
    """
    try:
        found = torch.load(
            file, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(file)
        )
    except (MemoryError, OSError):
        raise
    except Exception as e:  # a damaged pickle raises whatever its opcodes run into
        raise ValueError(f"{file}: {_refusal(e)}") from e
    if not isinstance(found, Mapping) or not found:
        raise ValueError(f"{file} holds no table of tensors; it is no checkpoint's weights")
    for name, t in found.items():
        if not isinstance(name, str) or not isinstance(t, Tensor) or t.layout != torch.strided:
            raise ValueError(
                f"{file}: {name!r} is no plain tensor but a {type(t).__name__}; a checkpoint's "
                "weights are one flat table of name and tensor"
            )
        if t.dtype not in NAMES:
            raise ValueError(f"{file}: {name} has data type {t.dtype}, which is not known here")
    return dict(found)


def _refusal(e: Exception) -> str:
    """Why torch would not read it, without its advice to read it anyway."""
    text = " ".join(str(e).split())
    asked = re.search(r"(?:Unsupported (?:global|class)[^:]*: )?GLOBAL ([\w.]+)", text)
    if asked:
        return (
            f"it asks for {asked[1]}, which is no tensor, and was refused: a pickle can run any "
            "code; get this model as safetensors"
        )
    return f"torch.load(weights_only=True) cannot read it ({text[:150]}); download or copy it again"


def _write(path: Path, tensors: Mapping[str, Tensor]) -> None:
    """One safetensors file, a piece of a tensor at a time in memory."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    at = 0
    for name, t in tensors.items():
        size = t.numel() * t.element_size()
        header[name] = {
            "dtype": NAMES[t.dtype], "shape": list(t.shape), "data_offsets": [at, at + size],
        }  # fmt: skip
        at += size
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as f:
        f.write(struct.pack("<Q", len(text)) + text)
        for t in tensors.values():
            flat = t.detach().contiguous().view(-1).view(torch.uint8)
            for piece in flat.split(PIECE):
                f.write(piece.numpy().data)
        f.flush()
        os.fsync(f.fileno())
