"""Rows in seeded order are those of a list of all rows that is shuffled, without that list."""

from __future__ import annotations

import csv
import gzip
import json
import random
from array import array
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import pytest
from places import MODEL
from transformers import AutoTokenizer

from moe_fair.moe import shuffled_rows
from moe_fair.moe.calibration_text import sample
from moe_fair.moe.left_out import LeftOut
from moe_fair.moe.row_files import read_rows
from moe_fair.moe.rows import Row
from moe_fair.moe.text_sources import expand, parse_source, read_parts

ROWS = [
    {"text": None if n % 7 == 3 else f"document {n}", "domain": ("a", "b", None)[n % 3]}
    for n in range(400)
]
FORMS = ("x.jsonl", "x.jsonl.gz", "x.json", "x.csv", "x.parquet", "crlf.jsonl", "bom.jsonl")


@pytest.fixture
def large(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every file is one that is not read at once."""
    monkeypatch.setattr(shuffled_rows, "SMALL", 0)
    monkeypatch.setattr(shuffled_rows, "FIRST", 5)


def write(path: Path, rows: list[dict[str, Any]]) -> Path:
    lines = "".join(json.dumps(r) + "\n" for r in rows)
    if path.suffix == ".gz":
        path.write_bytes(gzip.compress(lines.encode()))
    elif path.suffix == ".json":
        path.write_text(json.dumps(rows))
    elif path.suffix == ".csv":
        with path.open("w", newline="") as f:
            writer = csv.writer(f)
            writer.writerows([["text", "domain"], *([r["text"], r["domain"]] for r in rows)])
    elif path.suffix == ".parquet":
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path, row_group_size=60)
    elif path.stem == "crlf":
        path.write_bytes(lines.replace("\n", "\r\n").encode())
    else:
        path.write_text(lines, encoding="utf-8-sig" if path.stem == "bom" else "utf-8")
    return path


@pytest.mark.usefixtures("large")
@pytest.mark.parametrize("seed", [None, 0, 3])
@pytest.mark.parametrize("name", FORMS)
@pytest.mark.parametrize("spec", ["{}", "all={}"])
def test_the_order_is_that_of_a_shuffled_list(
    tmp_path: Path, name: str, spec: str, seed: int | None
) -> None:
    path = write(tmp_path / name, ROWS)
    parts = expand([parse_source(spec.format(path))])
    found = {p.name: list(rows) for p, rows in read_parts(parts, seed, LeftOut())}
    assert set(found) == ({"all"} if "=" in spec else {"a", "b", name.split(".")[0]})
    for domain, rows in found.items():
        want: list[Any] = [
            row for _, row in read_rows(path, domains="=" not in spec) if isinstance(row, Row)
        ]
        if "=" not in spec:
            want = [r for r in want if (r.domain or name.split(".")[0]) == domain]
        if seed is not None:
            random.Random(f"{seed} {domain}").shuffle(want)
        assert rows == want
        assert len(rows) > 100


@pytest.mark.usefixtures("large")
@pytest.mark.parametrize("name", [n for n in FORMS if n != "x.json"])
def test_only_what_is_asked_for_is_kept(
    tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, passes = write(tmp_path / name, ROWS), []

    def reading(*given: Any, **more: Any) -> Any:
        passes.append(len(more["wanted"]))
        return read_rows(*given, **more)

    monkeypatch.setattr(shuffled_rows, "read_rows", reading)
    numbers = array("q", [n for n, r in enumerate(ROWS) if r["text"]])
    rows = shuffled_rows.rows_in_order(path, numbers, domains=False)
    for _ in range(30):
        next(rows)
    assert passes == [5, 20, 80]


def test_row_groups_of_which_nothing_is_wanted_are_not_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, groups = write(tmp_path / "x.parquet", ROWS), []
    real = pyarrow.parquet.ParquetFile.iter_batches

    def reading(self: Any, *given: Any, **more: Any) -> Any:
        groups.extend(more["row_groups"])
        return real(self, *given, **more)

    monkeypatch.setattr(pyarrow.parquet.ParquetFile, "iter_batches", reading)
    found = [n for n, _ in read_rows(path, wanted=frozenset({5, 130, 133}))]
    assert found == [5, 130, 133]
    assert groups == [0, 2]


def test_many_text_files_are_documents_of_one_domain(tmp_path: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(MODEL)
    folder = tmp_path / "notes"
    for n in range(300):
        (folder / f"{n % 3}").mkdir(parents=True, exist_ok=True)
        (folder / f"{n % 3}" / f"{n:03d}.txt").write_text(f"short {n}")
    (folder / "bad.txt").write_bytes(b"\xff\xfe")
    (folder / "bad.txt.gz").write_bytes(b"no gz at all")
    for spec, name in ((f"{folder}", "notes"), (f"all={folder}", "all")):
        found = sample([parse_source(spec)], tokenizer, samples=8, length=16, seed=0)
        assert found.domains == (name,)
        assert len(found.sequences) == 8
        assert found.notes == (
            f"{folder}: 302 .txt files are one domain, each a document of it",
            f"{folder}: 2 rows skipped; the first: {folder}, bad.txt: the text is not UTF-8",
        )
    # in the order of a shuffled list, and packed like the rows of a file
    texts = [p.read_text() for p in sorted(folder.glob("?/*.txt"))]
    random.Random("0 notes").shuffle(texts)
    want = [i for t in texts for i in (*tokenizer(t)["input_ids"], tokenizer.eos_token_id)]
    found = sample([parse_source(str(folder))], tokenizer, samples=8, length=16, seed=0)
    assert [i for ids, _ in found.sequences for i in ids] == want[: 8 * 16]
    # other files beside them are domains of their own
    (folder / "more.jsonl").write_text(json.dumps({"text": "long " * 99}))
    found = sample([parse_source(str(folder))], tokenizer, samples=8, length=16, seed=0)
    assert found.domains == ("notes", "more")
    assert [sum(d == i for _, d in found.sequences) for i in range(2)] == [4, 4]
