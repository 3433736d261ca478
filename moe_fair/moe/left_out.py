"""What of a calibration source is not used: rows, files and fields, counted for one note each.

And what else a user should know of how it is read.
"""

from __future__ import annotations

from array import array
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from moe_fair.core.quote import clip
from moe_fair.moe.row_files import read_rows
from moe_fair.moe.rows import BadRow, Row
from moe_fair.moe.schemas import SCHEMAS, Schema

PLURALS = {"device or pipe": "devices or pipes", "file of another kind": "files of another kind"}


@dataclass
class LeftOut:
    """Of one source, as it was given.

    Attributes:
        rows: cannot be used; first_row: the first, with its place and the reason.
        files: of a directory, of which no row can be used; first_file: likewise.
        others: of a directory, that are not for reading: kind -> how many.
        fields: of rows that are used, with names that mean nothing here.
        said: how rows are read, where that is not plain.
        cut: chats that are longer than a sample.
    """

    rows: int = 0
    first_row: str = ""
    files: int = 0
    first_file: str = ""
    others: Counter[str] = field(default_factory=Counter)
    fields: dict[str, None] = field(default_factory=dict)
    said: dict[str, None] = field(default_factory=dict)
    cut: int = 0

    def row(self, where: str | Path, place: str, why: str) -> None:
        """Count a row that cannot be used."""
        self.rows += 1
        self.first_row = self.first_row or (
            f"{where}, {place}: {why}" if place else f"{where}: {why}"
        )

    def used(self, row: Row) -> None:
        """What there is to say of a row that can be used."""
        self.fields.update(dict.fromkeys(row.unused))
        if row.said:
            self.said[row.said] = None

    def file(self, why: str) -> None:
        """Count a file of which no row can be used."""
        self.files += 1
        self.first_file = self.first_file or why

    def notes(self, given: str) -> list[str]:
        """One line for each kind of what was left out, and for how the rest is read."""
        found = list(self.said)
        if self.rows:
            found.append(f"{_many(self.rows, 'row')} skipped; the first: {self.first_row}")
        if self.files:
            found.append(f"{_many(self.files, 'file')} skipped; the first: {self.first_file}")
        if self.others:
            counts = [_many(n, what) for what, n in sorted(self.others.items())]
            found.append(f"not read: {', '.join(counts)}")
        if self.fields:
            found.append(f"fields not used: {clip(', '.join(self.fields), 200)}")
        if self.cut:
            found.append(f"{_many(self.cut, 'chat')} cut to --length")
        return [f"{given}: {text}" for text in found]

    def nothing(self, given: str, length: int) -> str:
        """Why a source gave no sample."""
        why = (
            f"; {_many(self.rows, 'row')} skipped, the first: {self.first_row}" if self.rows else ""
        )
        return (
            f"{given}: too little text for one sample of {length} tokens; give more text or a "
            f"smaller --length{why}"
        )


def survey(
    path: Path, left_out: LeftOut, *, domains: bool, schemas: Sequence[Schema] = SCHEMAS
) -> dict[str | None, array[int]]:
    """Read a file through: domain -> numbers of its rows that can be used, None for no name.

    Args:
        left_out: is told of the others.
        domains: rows may name their domain.
        schemas: those that rows may be of.

    Raises:
        ValueError: no row of it can be used; says why the first cannot.
    """
    found: dict[str | None, array[int]] = {}
    here = LeftOut()
    for n, row in read_rows(path, domains=domains, schemas=schemas):
        if isinstance(row, BadRow):
            here.row(path, row.place, row.why)
        else:
            found.setdefault(row.domain, array("q")).append(n)
            here.used(row)
    if not found:
        if not here.rows:
            raise ValueError(f"{path}: holds no rows")
        more = f"; none of its {here.rows} rows can be used" if here.rows > 1 else ""
        raise ValueError(here.first_row + more)
    left_out.rows += here.rows
    left_out.first_row = left_out.first_row or here.first_row
    left_out.fields.update(here.fields)
    left_out.said.update(here.said)
    return found


def _many(count: int, what: str) -> str:
    return f"{count:,} {what if count == 1 else PLURALS.get(what, what + 's')}"
