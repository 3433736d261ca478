"""Safetensors files as byte ranges: read headers, map tensors, write shards without a model.

A safetensors file is an 8-byte little-endian header length, a JSON header
{name: {dtype, shape, data_offsets}}, and the tensors' bytes. Copying byte ranges keeps every data
type as it is and needs no memory beyond one buffer.
"""

from __future__ import annotations

import errno
import itertools
import json
import math
import os
import re
import struct
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
MAX_SHARD_BYTES = 5_000_000_000  # as on the Hub
BUFFER = 64 * 2**20
ONE_EXPERT = re.compile(r".*\.experts\.\d+\.")
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


def write_shards(
    tensors: Iterable[StoredTensor],
    folder: Path,
    *,
    max_shard_bytes: int = MAX_SHARD_BYTES,
    advance: Callable[[int], None] = lambda _: None,
) -> None:
    """Copy tensors into new safetensors shards, with an index where there are several.

    Args:
        tensors: in the order in which they shall lie.
        folder: an existing directory.
        max_shard_bytes: a shard is closed before it grows beyond this.
        advance: told the number of bytes after each copy.
    """
    shards = list(_divide(tensors, max_shard_bytes))
    weight_map: dict[str, str] = {}
    for i, shard in enumerate(shards):
        name = SINGLE if len(shards) == 1 else f"model-{i + 1:05d}-of-{len(shards):05d}.safetensors"
        write_shard(shard, folder / name, advance)
        weight_map.update(dict.fromkeys((t.name for t in shard), name))
    if len(shards) > 1:
        total = {
            "total_parameters": sum(t.numel for s in shards for t in s),
            "total_size": sum(t.bytes for s in shards for t in s),
        }
        index = {"metadata": total, "weight_map": dict(sorted(weight_map.items()))}
        (folder / INDEX).write_text(json.dumps(index, indent=2) + "\n")


def _divide(tensors: Iterable[StoredTensor], most: int) -> Iterator[list[StoredTensor]]:
    """Into shards; what lies together of one expert stays in one, as some loaders need it."""
    shard: list[StoredTensor] = []
    size = 0
    for _, its in itertools.groupby(tensors, _owner):
        together = list(its)
        more = sum(t.bytes for t in together)
        if shard and size + more > most:
            yield shard
            shard, size = [], 0
        shard += together
        size += more
    if shard:
        yield shard


def _owner(t: StoredTensor) -> str:
    """The expert that a tensor is of; of no expert, the tensor itself."""
    match = ONE_EXPERT.match(t.name)
    return match[0] if match else t.name


def write_shard(shard: Sequence[StoredTensor], path: Path, advance: Callable[[int], None]) -> None:
    """Write one safetensors file; `advance` is told the number of bytes after each copy."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for t in shard:
        end = offset + t.bytes
        header[t.name] = {"dtype": t.dtype, "shape": list(t.shape), "data_offsets": [offset, end]}
        offset = end
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    handles: dict[Path, int] = {}
    target = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o666)
    try:
        _write_all(target, struct.pack("<Q", len(text)) + text)
        for made, its in itertools.groupby(shard, lambda t: isinstance(t, MadeTensor)):
            if made:
                for t in its:
                    _make(t, target, advance)
                continue
            for piece in _coalesced(p for t in its for p in t.pieces):
                if piece.file not in handles:
                    handles[piece.file] = os.open(piece.file, os.O_RDONLY)
                _copy(handles[piece.file], target, piece, advance)
    finally:
        for handle in (target, *handles.values()):
            os.close(handle)


def _coalesced(pieces: Iterable[Piece]) -> Iterator[Piece]:
    """Neighbouring pieces of one file as one."""
    last: Piece | None = None
    for p in pieces:
        if last and last.file == p.file and last.start + last.length == p.start:
            last = Piece(p.file, last.start, last.length + p.length)
        else:
            if last:
                yield last
            last = p
    if last:
        yield last


def _make(t: StoredTensor, target: int, advance: Callable[[int], None]) -> None:
    assert isinstance(t, MadeTensor)
    done = 0
    for data in t.make():
        _write_all(target, data)
        advance(len(data))
        done += len(data)
    assert done == t.bytes, (t.name, done, t.bytes)


def _copy(source: int, target: int, piece: Piece, advance: Callable[[int], None]) -> None:
    start, left = piece.start, piece.length
    while left:
        count = _copy_some(source, target, start, min(left, BUFFER))
        if not count:
            raise ValueError(f"{piece.file} ended {left:,} bytes early while it was copied")
        start, left = start + count, left - count
        advance(count)


def _copy_some(source: int, target: int, start: int, most: int) -> int:
    """Append up to `most` bytes; by the kernel where it can, else through a buffer."""
    if hasattr(os, "copy_file_range"):
        try:
            return os.copy_file_range(source, target, most, offset_src=start)
        except OSError as e:
            # other file systems, or an old kernel; a full disk is told as it is
            if e.errno not in (errno.EXDEV, errno.EINVAL, errno.ENOSYS, errno.EOPNOTSUPP):
                raise
    chunk = os.pread(source, most, start)
    _write_all(target, chunk)
    return len(chunk)


def _write_all(handle: int, data: bytes) -> None:
    view = memoryview(data)
    while view:
        view = view[os.write(handle, view) :]
