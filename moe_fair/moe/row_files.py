"""Files of calibration text: which are read, and how rows lie in them.

    .txt        the whole file is one text
    .jsonl      a row a line
    .json       an array of rows, or one row
    .csv        a header, then a row a line
    .parquet    a table of rows

A directory of many .txt files is read like one file, a row a file. All but .parquet are also read
with .gz behind it. Text is UTF-8, with or without a byte order mark.
"""

from __future__ import annotations

import csv
import gzip
import os
import sys
import zlib
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence, Set
from pathlib import Path
from typing import Any, TextIO

from moe_fair.core.quote import clip
from moe_fair.moe.rows import BadRow, Row, parse_row
from moe_fair.moe.schemas import SCHEMAS, Schema, parse_json

SUFFIXES = (".txt", ".jsonl", ".json", ".csv", ".parquet")


def kind(path: Path) -> str | None:
    """Which of SUFFIXES a file's name ends in, in letters of any size; None for no such file."""
    name = path.name.lower()
    packed = name.endswith(".gz")
    found = next((s for s in SUFFIXES if name.removesuffix(".gz").endswith(s)), None)
    return None if packed and found == ".parquet" else found


def files_in(folder: Path) -> tuple[list[Path], Counter[str]]:
    """The files in a folder and its subfolders that are read, and what else lies there, counted.

    Raises:
        OSError: a folder that cannot be read.
    """

    def stop(e: OSError) -> None:
        raise e

    found: list[Path] = []
    left: Counter[str] = Counter()
    for root, folders, names in os.walk(folder, onerror=stop):
        for name in list(folders):
            hidden, linked = name.startswith("."), (Path(root) / name).is_symlink()
            if hidden or linked:
                left["hidden folder" if hidden else "linked folder"] += 1
                folders.remove(name)
        for name in names:
            path = Path(root) / name
            if name.startswith("."):
                left["hidden file"] += 1
            elif kind(path) is None:
                left["file of another kind"] += 1
            elif not path.exists():
                left["dangling link"] += 1
            elif not path.is_file():
                left["device or pipe"] += 1
            elif not path.stat().st_size:
                left["empty file"] += 1
            else:
                found.append(path)
    return sorted(found), left


def document_files(folder: Path) -> list[Path]:
    """The .txt files of a directory, in the order of their rows where it is read like one file."""
    return [f for f in files_in(folder)[0] if kind(f) == ".txt"]


def read_rows(
    path: Path,
    *,
    domains: bool = True,
    schemas: Sequence[Schema] = SCHEMAS,
    wanted: Set[int] | None = None,
) -> Iterator[tuple[int, Row | BadRow]]:
    """The rows of a file (or of a directory of .txt files) and their numbers, in its order.

    Args:
        domains: rows may name their domain; otherwise the field is not looked at.
        schemas: those that its rows may be of.
        wanted: numbers of the only rows that are read; the others are passed over.

    Raises:
        ValueError: the file is damaged; says how.
        OSError: the system does not give it.
    """
    name = kind(path)
    reader = _documents if path.is_dir() else _READERS[str(name)]
    left = -1 if wanted is None else len(wanted)
    try:
        for n, place, found in reader(path, wanted):
            yield n, parse_row(found, place, domains=domains, schemas=schemas)
            left -= 1
            if not left:
                return
    except (gzip.BadGzipFile, EOFError, zlib.error) as e:
        raise ValueError(f"{path}: cannot be read as calibration text: {e}") from e


def _open(path: Path, newline: str | None = None) -> TextIO:
    """A text file, compressed or not, without its byte order mark; see `_whole`."""
    given: Any = {"encoding": "utf-8-sig", "errors": "surrogateescape", "newline": newline}
    return gzip.open(path, "rt", **given) if path.suffix.lower() == ".gz" else path.open(**given)


Wanted = Set[int] | None
# what a file holds: the number, place and content of every row, or the error that it is
Found = Iterator[tuple[int, str, Any]]


def _text(path: Path, wanted: Wanted) -> Found:
    with _open(path) as f:
        yield 0, "", f.read()


def _documents(folder: Path, wanted: Wanted) -> Found:
    for n, path in enumerate(document_files(folder)):
        if wanted is not None and n not in wanted:
            continue
        try:
            with _open(path) as f:
                found: Any = f.read()
        except (gzip.BadGzipFile, EOFError, zlib.error) as e:
            found = ValueError(f"cannot be read as calibration text: {e}")
        yield n, path.relative_to(folder).as_posix(), found


def _lines(path: Path, wanted: Wanted) -> Found:
    with _open(path) as f:
        for n, line in enumerate(f):
            if (wanted is None or n in wanted) and line.strip():
                yield n, f"line {n + 1}", _fields(line)


def _array(path: Path, wanted: Wanted) -> Found:
    with _open(path) as f:
        text = f.read()
    found = _fields(text, within=True)
    if not isinstance(found, list):
        yield 0, "", found
        return
    for n, value in enumerate(found):
        if wanted is None or n in wanted:
            yield n, f"row {n + 1}", value if isinstance(value, Mapping) else None


def _table(path: Path, wanted: Wanted) -> Found:
    """Empty cells are no values; a row must have as many fields as the header."""
    limit = csv.field_size_limit(sys.maxsize)
    try:
        with _open(path, newline="") as f:
            reader = csv.reader(f, strict=True)
            header: list[str] | None = None
            n = 0
            while True:
                place = f"line {reader.line_num + 1}"
                try:
                    cells: Any = next(reader)
                except StopIteration:
                    return
                except csv.Error as e:
                    cells = ValueError(f"not CSV: {e}")
                if header is None and isinstance(cells, list):
                    header = cells or None
                elif cells:
                    if wanted is None or n in wanted:
                        yield n, place, _cells(header, cells)
                    n += 1
    finally:
        csv.field_size_limit(limit)


def _cells(header: list[str] | None, cells: Any) -> Any:
    if header is None or not isinstance(cells, list):
        return cells
    if len(cells) != len(header):
        return ValueError(f"{len(cells)} fields, and the header has {len(header)}")
    return {k: v or None for k, v in zip(header, cells, strict=True)}


def _parquet(path: Path, wanted: Wanted) -> Found:
    """Row groups of which nothing is wanted are not read."""
    import pyarrow
    import pyarrow.parquet

    first = 0
    try:
        with pyarrow.parquet.ParquetFile(path) as file:
            for group in range(file.metadata.num_row_groups):
                rows = range(first, first + file.metadata.row_group(group).num_rows)
                first = rows.stop
                if wanted is not None and wanted.isdisjoint(rows):
                    continue
                n = rows.start
                for batch in file.iter_batches(batch_size=1024, row_groups=[group]):
                    here: Sequence[int] = range(n, n + len(batch))
                    found = batch
                    if wanted is not None:
                        here = [i for i in here if i in wanted]
                        found = batch.take(pyarrow.array([i - n for i in here], pyarrow.int64()))
                    n += len(batch)
                    for i, row in zip(here, found.to_pylist(), strict=True):
                        yield i, f"row {i + 1}", row
    except (pyarrow.ArrowException, OSError) as e:
        if getattr(e, "errno", None):  # of the system; of damage there is none
            raise
        raise ValueError(f"{path}: cannot be read as parquet: {clip(str(e), 200)}") from e


def _fields(text: str, within: bool = False) -> Any:
    """A JSON object (or an array of rows), None for other JSON, or the error that it is."""
    try:
        found = parse_json(text)
    except ValueError as e:
        return e
    return found if isinstance(found, (dict, list) if within else dict) else None


_READERS: dict[str, Callable[[Path, Wanted], Found]] = {
    ".txt": _text, ".jsonl": _lines, ".json": _array, ".csv": _table, ".parquet": _parquet,
}  # fmt: skip
