"""Safetensors files as byte ranges: read headers and map tensors without a model.

A safetensors file is an 8-byte little-endian header length, a JSON header
{name: {dtype, shape, data_offsets}}, and the tensors' bytes.
"""

from __future__ import annotations

import itertools
import json
import math
import struct
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
# of one element, by data type; of a type that is not here the size is not checked
BITS = {
    "BOOL": 8, "U8": 8, "I8": 8, "F8_E5M2": 8, "F8_E4M3": 8, "F8_E8M0": 8, "I16": 16, "U16": 16,
    "F16": 16, "BF16": 16, "I32": 32, "U32": 32, "F32": 32, "I64": 64, "U64": 64, "F64": 64,
    "C64": 64,
}  # fmt: skip


@dataclass(frozen=True)
class Piece:
    """A range of bytes in a file."""

    file: Path
    start: int
    length: int


@dataclass(frozen=True)
class StoredTensor:
    """A tensor as it lies, or shall lie, on disk.

    Attributes:
        name, dtype, shape: of its safetensors header entry.
        pieces: the bytes in order; one piece where the tensor is copied whole.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    pieces: tuple[Piece, ...]

    @property
    def bytes(self) -> int:
        """Its size on disk."""
        return sum(p.length for p in self.pieces)

    @property
    def numel(self) -> int:
        """Its number of elements."""
        n = 1
        for s in self.shape:
            n *= s
        return n

    def renamed(self, name: str) -> StoredTensor:
        """The same bytes under another name."""
        return StoredTensor(name, self.dtype, self.shape, self.pieces)

    def take(self, ids: Iterable[int], dim: int = 0) -> StoredTensor:
        """The tensor with these indices of one axis; dim 0, or dim 1 of a [1, n] tensor.

        Neighbouring rows become one piece.
        """
        assert dim == 0 or (dim == 1 and self.shape[0] == 1), (self.name, self.shape, dim)
        [whole] = self.pieces
        row = whole.length // self.shape[dim]
        pieces: list[Piece] = []
        count = 0
        for i in ids:
            count += 1
            start = whole.start + i * row
            if pieces and pieces[-1].start + pieces[-1].length == start:
                last = pieces.pop()
                pieces.append(Piece(whole.file, last.start, last.length + row))
            else:
                pieces.append(Piece(whole.file, start, row))
        shape = (*self.shape[:dim], count, *self.shape[dim + 1 :])
        return StoredTensor(self.name, self.dtype, shape, tuple(pieces))


@dataclass(frozen=True)
class MadeTensor(StoredTensor):
    """A tensor whose bytes lie nowhere yet: they are made when they are written.

    Attributes:
        make: gives them, a piece at a time.
    """

    make: Callable[[], Iterable[bytes]]

    @property
    def bytes(self) -> int:
        """See `StoredTensor`."""
        return bytes_of(self)


def bytes_of(t: StoredTensor) -> int:
    """What a tensor takes once it is written, whether its bytes lie somewhere already or not."""
    return t.numel * BITS[t.dtype] // 8


def shard_files(folder: Path) -> list[Path]:
    """The safetensors files of a checkpoint, in the order of their names.

    Raises:
        ValueError: there are none, one is missing, or the index points outside the folder.
    """
    index = folder / INDEX
    names = indexed(index) if index.is_file() else [SINGLE]
    for name in names:
        if not _is_file(folder / name):
            pickles = sorted(folder.glob("*.bin"))
            why = (
                f"; {pickles[0].name} is a pickle, which can run code when read: --allow-pickle "
                "reads its tensors and runs nothing"
                if pickles
                else ""
            )
            raise ValueError(
                f"{folder}: {name} is missing; weights are read from safetensors files only{why}"
            )
    return [folder / n for n in names]


def unnamed_files(folder: Path, belongs: Callable[[str], bool]) -> list[Path]:
    """Files beside those of `shard_files` of which every tensor belongs to the model by its name.

    Raises:
        ValueError: as `shard_files`.
    """
    named = set(shard_files(folder))
    found = []
    for file in sorted(set(folder.glob("*.safetensors")) - named):
        try:
            names = [t.name for t in stored_tensors(file)]
        except ValueError:
            if belongs(file.name):  # by its name it is needed: said by whoever reads it
                found.append(file)
            continue
        if names and all(map(belongs, names)):
            found.append(file)
    return found


def indexed(index: Path) -> list[str]:
    """The files that an index names, in the order of their names.

    Raises:
        ValueError: it is no index, names no file, or one outside its folder.
    """
    try:
        names = set(json.loads(index.read_text())["weight_map"].values())
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as e:
        raise ValueError(f"{index}: cannot be read as an index of shards: {e}") from e
    for name in names:
        if not isinstance(name, str) or Path(name).name != name or "\0" in name:
            raise ValueError(f"{index}: names {name!r}, which lies outside the checkpoint")
    if not names:
        raise ValueError(f"{index}: names no shard")
    return sorted(names)


def _is_file(path: Path) -> bool:
    try:
        return path.is_file()
    except (OSError, ValueError):  # a name that no file can have
        return False


def stored_tensors(file: Path) -> list[StoredTensor]:
    """The tensors of one safetensors file in the order of their bytes.

    Raises:
        ValueError: the file is no safetensors file, is cut short, or its header contradicts it.
    """
    size = file.stat().st_size
    with file.open("rb") as f:
        start = f.read(8)
        length = struct.unpack("<Q", start)[0] if len(start) == 8 else size
        if length > size - 8:
            raise ValueError(f"{file}: not a whole safetensors file; download or copy it again")
        try:
            header = json.loads(f.read(length), object_pairs_hook=_unique)
            header.pop("__metadata__", None)
            found = [_stored(file, 8 + length, n, v) for n, v in header.items()]
            found.sort(key=lambda t: (t.pieces[0].start, t.bytes))
            _check_apart(found)
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as e:
            raise ValueError(f"{file}: its safetensors header cannot be read: {e}") from e
    missing = max((t.pieces[0].start + t.bytes for t in found), default=0) - size
    if missing > 0:
        raise ValueError(
            f"{file}: {missing:,} bytes are missing at its end; download or copy it again"
        )
    return found


def checkpoint_tensors(folder: Path, shards: Sequence[Path]) -> list[StoredTensor]:
    """Every tensor of a checkpoint's shards.

    Raises:
        ValueError: a file as in `stored_tensors`, a tensor that lies in two of them, or one that
            the index names and its shard does not hold: a loader would make it up at random.
    """
    found: dict[str, StoredTensor] = {}
    for t in (t for s in shards for t in stored_tensors(s)):
        if t.name in found:
            a, b = (x.pieces[0].file.name for x in (found[t.name], t))
            raise ValueError(f"{folder}: {t.name} lies in {a} and in {b}; which one counts?")
        found[t.name] = t
    index = folder / INDEX
    for name, shard in (
        json.loads(index.read_text())["weight_map"].items() if index.is_file() else ()
    ):
        if name not in found or found[name].pieces[0].file.name != shard:
            raise ValueError(
                f"{index}: {name} is not in {shard}; download or copy the checkpoint again"
            )
    return list(found.values())


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        names = [n for n, _ in pairs]
        raise ValueError(f"{next(n for n in names if names.count(n) > 1)!r} occurs twice")
    return found


def _stored(file: Path, base: int, name: str, entry: dict[str, Any]) -> StoredTensor:
    begin, end = entry["data_offsets"]
    shape, dtype = entry["shape"], entry["dtype"]
    if not isinstance(shape, list) or not all(type(n) is int for n in (begin, end, *shape)):
        raise ValueError(f"{name} has a shape or offsets that are not whole numbers")
    if not 0 <= begin <= end or min(shape, default=0) < 0:
        raise ValueError(f"{name} has shape {shape} and offsets {begin}..{end}")
    if not isinstance(dtype, str):
        raise ValueError(f"{name} has data type {dtype!r}")
    bits = BITS.get(dtype)
    if bits is not None and (end - begin) * 8 != math.prod(shape) * bits:
        raise ValueError(f"{name} is {dtype} {shape}, which does not take {end - begin:,} bytes")
    return StoredTensor(name, dtype, tuple(shape), (Piece(file, base + begin, end - begin),))


def _check_apart(found: Sequence[StoredTensor]) -> None:
    """No two tensors, in the order of their bytes, share any."""
    for a, b in itertools.pairwise(found):
        if a.pieces[0].start + a.bytes > b.pieces[0].start:
            raise ValueError(f"{a.name} and {b.name} share bytes")
