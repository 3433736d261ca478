"""What two checkpoints hold, compared byte by byte, and whether numbers are finite."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
from torch import Tensor

from moe_fair.core.manifest import CHUNK
from moe_fair.engines.shards import Piece, StoredTensor

Bytes = list[tuple[int, int]]  # ranges within a tensor: start, length


class Wrong(Exception):
    """What a check found."""


def check_table(want: Tensor, new: StoredTensor, reading: Reading) -> None:
    """The table holds these numbers."""
    [piece] = new.pieces
    if reading.bytes(piece.file, piece.start, piece.length) != want.numpy().tobytes():
        raise Wrong(f"{new.name} does not name the remaining experts by its rule")


def check_same(old: StoredTensor, ranges: Bytes, new: StoredTensor, reading: Reading) -> None:
    """The ranges of `old`, one after another, are the bytes of `new`."""
    [before], [after] = old.pieces, new.pieces
    at = after.start
    for start, length in ranges:
        done = 0
        while done < length:
            count = min(CHUNK, length - done)
            a = reading.bytes(before.file, before.start + start + done, count)
            b = reading.bytes(after.file, at, count)
            if a != b:
                raise Wrong(f"{new.name} differs from the original's {old.name}")
            done, at = done + count, at + count
    if at != after.start + after.length:
        raise Wrong(f"{new.name} has {after.length:,} bytes, expected {at - after.start:,}")


def check_finite(t: StoredTensor, reading: Reading) -> None:
    """Every number of it is one."""
    from moe_fair.engines.stored_values import TORCH

    kind = TORCH.get(t.dtype)
    if kind is None:
        raise Wrong(f"{t.name}: {t.dtype} is not a type that a repair writes")
    if not kind.is_floating_point:
        return
    for data in _chunks(t.pieces, reading):
        values = torch.frombuffer(bytearray(data), dtype=kind)
        if not bool(torch.isfinite(values if values.itemsize > 1 else values.float()).all()):
            raise Wrong(f"{t.name} holds NaN or Inf")


def _chunks(pieces: Sequence[Piece], reading: Reading) -> Iterator[bytes]:
    for p in pieces:
        for start in range(0, p.length, CHUNK):
            yield reading.bytes(p.file, p.start + start, min(CHUNK, p.length - start))


class Reading:
    """Files that stay open while ranges of them are read."""

    def __init__(self) -> None:
        self._handles: dict[Path, int] = {}

    def __enter__(self) -> Reading:
        return self

    def __exit__(self, *_: object) -> None:
        for handle in self._handles.values():
            os.close(handle)

    def bytes(self, file: Path, start: int, count: int) -> bytes:
        """Exactly so many bytes."""
        if file not in self._handles:
            self._handles[file] = os.open(file, os.O_RDONLY)
        parts = b""
        while len(parts) < count:
            more = os.pread(self._handles[file], count - len(parts), start + len(parts))
            if not more:
                raise Wrong(f"{file.name} ends early")
            parts += more
        return parts
