"""Writing tensors into safetensors shards: byte ranges are copied, without a model.

Copying byte ranges keeps every data type as it is and needs no memory beyond one buffer.
"""

from __future__ import annotations

import errno
import itertools
import json
import os
import re
import struct
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from moe_fair.engines.shards import INDEX, SINGLE, MadeTensor, Piece, StoredTensor

MAX_SHARD_BYTES = 5_000_000_000  # as on the Hub
BUFFER = 64 * 2**20
ONE_EXPERT = re.compile(r".*\.experts\.\d+\.")


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


def write_shard(
    shard: Sequence[StoredTensor],
    path: Path,
    advance: Callable[[int], None] = lambda _: None,
    metadata: Mapping[str, str] | None = None,
) -> None:
    """Write one safetensors file; `advance` is told the number of bytes after each copy."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt", **(metadata or {})}}
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
