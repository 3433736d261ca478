"""The rows of a file in an order of their own, without all of them in memory.

A small file is read once. Of a large one, the rows that come first in the order are looked for in
one pass, four times as many in the next, until nobody asks for more.
"""

from __future__ import annotations

from array import array
from collections.abc import Iterator, Sequence
from pathlib import Path

from moe_fair.moe.row_files import kind, read_rows
from moe_fair.moe.rows import Row
from moe_fair.moe.schemas import SCHEMAS, Schema

SMALL = 2**25  # bytes of a file that is read once
PACKED = 8  # what a packed file may grow by
FIRST, MORE = 1024, 4  # rows of the first pass, and how many times more each next one has


def rows_in_order(
    path: Path, order: array[int], *, domains: bool, schemas: Sequence[Schema] = SCHEMAS
) -> Iterator[Row]:
    """The rows with these numbers, in this order.

    Args:
        domains: rows may name their domain.
        schemas: those that rows may be of.
    """
    at, step = 0, len(order) if _read_once(path) else FIRST
    while at < len(order):
        part = order[at : at + step]
        found = dict(read_rows(path, domains=domains, schemas=schemas, wanted=frozenset(part)))
        yield from (row for n in part if isinstance(row := found.pop(n, None), Row))
        at, step = at + step, step * MORE


def rows_as_they_lie(
    path: Path, numbers: array[int], *, domains: bool, schemas: Sequence[Schema] = SCHEMAS
) -> Iterator[Row]:
    """The rows with these numbers, which ascend, in one pass."""
    at = 0
    for n, row in read_rows(path, domains=domains, schemas=schemas):
        if at == len(numbers):
            return
        if n == numbers[at]:
            at += 1
            if isinstance(row, Row):
                yield row


def _read_once(path: Path) -> bool:
    """It is small, or parsed whole whatever is wanted of it."""
    if path.is_dir():
        return False
    if kind(path) in (".json", ".txt"):
        return True
    packed = path.suffix.lower() in (".gz", ".parquet")
    return path.stat().st_size * (PACKED if packed else 1) <= SMALL
