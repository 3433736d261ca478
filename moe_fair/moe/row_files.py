"""Files of calibration text: which are read, and how rows lie in them.

    .txt        the whole file is one text
    .jsonl      a row a line
    .json       an array of rows, or one row
    .csv        a header, then a row a line
    .parquet    a table of rows

All but .parquet are also read with .gz behind it. Text is UTF-8, with or without a byte order mark.
"""

from __future__ import annotations

import csv
import gzip
import os
import sys
import zlib
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, TextIO

from moe_fair.core.quote import clip
from moe_fair.moe.rows import BadRow, Row, parse_json, parse_row

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


def read_rows(path: Path, *, domains: bool = True) -> Iterator[Row | BadRow]:
    """The rows of a file, in its order.

    Args:
        domains: rows may name their domain; otherwise the field is not looked at.

    Raises:
        ValueError: the file is damaged; says how.
        OSError: the system does not give it.
    """
    name = kind(path)
    assert name is not None, path
    try:
        for place, found in _READERS[name](path):
            yield parse_row(found, place, domains=domains)
    except (gzip.BadGzipFile, EOFError, zlib.error) as e:
        raise ValueError(f"{path}: cannot be read as calibration text: {e}") from e


def _open(path: Path, newline: str | None = None) -> TextIO:
    """A text file, compressed or not, without its byte order mark; see `_whole`."""
    given: Any = {"encoding": "utf-8-sig", "errors": "surrogateescape", "newline": newline}
    return gzip.open(path, "rt", **given) if path.suffix.lower() == ".gz" else path.open(**given)


# what a file holds: the place and the content of every row, or the error that it is
Found = Iterator[tuple[str, Any]]


def _text(path: Path) -> Found:
    with _open(path) as f:
        yield "", f.read()


def _lines(path: Path) -> Found:
    with _open(path) as f:
        for n, line in enumerate(f, 1):
            if line.strip():
                yield f"line {n}", _fields(line)


def _array(path: Path) -> Found:
    with _open(path) as f:
        text = f.read()
    found = _fields(text, within=True)
    if not isinstance(found, list):
        yield "", found
        return
    for n, value in enumerate(found, 1):
        yield f"row {n}", value if isinstance(value, Mapping) else None


def _table(path: Path) -> Found:
    """Empty cells are no values; a row must have as many fields as the header."""
    limit = csv.field_size_limit(sys.maxsize)
    try:
        with _open(path, newline="") as f:
            reader = csv.reader(f, strict=True)
            header: list[str] | None = None
            while True:
                place = f"line {reader.line_num + 1}"
                try:
                    cells = next(reader)
                except StopIteration:
                    return
                except csv.Error as e:
                    yield place, ValueError(f"not CSV: {e}")
                    continue
                if header is None and cells:
                    header = cells
                elif cells and header is not None:
                    yield place, _cells(header, cells)
    finally:
        csv.field_size_limit(limit)


def _cells(header: list[str], cells: list[str]) -> Any:
    if len(cells) != len(header):
        return ValueError(f"{len(cells)} fields, and the header has {len(header)}")
    return {k: v or None for k, v in zip(header, cells, strict=True)}


def _parquet(path: Path) -> Found:
    import pyarrow
    import pyarrow.parquet

    n = 0
    try:
        with pyarrow.parquet.ParquetFile(path) as file:
            for batch in file.iter_batches(batch_size=1024):
                for found in batch.to_pylist():
                    n += 1
                    yield f"row {n}", found
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


_READERS: dict[str, Callable[[Path], Found]] = {
    ".txt": _text, ".jsonl": _lines, ".json": _array, ".csv": _table, ".parquet": _parquet,
}  # fmt: skip
