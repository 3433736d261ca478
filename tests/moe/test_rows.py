"""Files and rows of calibration text: every format, what is skipped, and what is said of it."""

from __future__ import annotations

import gzip
import json
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import pytest
from places import MODEL
from transformers import AutoTokenizer

from moe_fair.moe.calibration_text import CalibrationSet, sample, windows
from moe_fair.moe.text_sources import Source, parse_source

WORDS = "alpha beta gamma delta " * 20
PARTS = (
    "{% for m in messages %}{{ m.role }}:"
    "{% for p in m.content %}{{ p.text }}{% endfor %};{% endfor %}"
)
STRINGS = "{% for m in messages %}{{ m.role }}:{{ m.content }};{% endfor %}"


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return AutoTokenizer.from_pretrained(MODEL)


def draw(given: Path | str, tokenizer: Any, **settings: Any) -> CalibrationSet:
    values = {"samples": 8, "length": 16, "seed": 0, **settings}
    return sample([parse_source(str(given))], tokenizer, **values)


def lines(path: Path, *rows: object) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("\n".join(r if isinstance(r, str) else json.dumps(r) for r in rows))
    return path


def packed(path: Path, text: str, encoding: str = "utf-8", newline: str = "\n") -> None:
    data = text.replace("\n", newline).encode(encoding)
    path.write_bytes(gzip.compress(data) if path.suffix.lower() == ".gz" else data)


ROWS = [{"text": f'{WORDS}\n{n}, "é"'} for n in range(3)]
WRITTEN: dict[str, Callable[[], str]] = {
    ".jsonl": lambda: "\n".join(map(json.dumps, ROWS)) + "\n\n",
    ".json": lambda: json.dumps(ROWS, indent=1),
    ".csv": lambda: "text\n" + "".join('"' + r["text"].replace('"', '""') + '"\n' for r in ROWS),
}


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig"])
@pytest.mark.parametrize("packing", ["", ".gz", ".GZ"])
@pytest.mark.parametrize("suffix", [".jsonl", ".json", ".csv", ".JSONL", ".Json", ".CSV"])
def test_every_format_gives_the_same_tokens(
    tokenizer: Any, tmp_path: Path, suffix: str, packing: str, encoding: str
) -> None:
    want = windows(
        [Source(str(lines(tmp_path / "x.jsonl", *ROWS)))], tokenizer, samples=9, length=16
    )
    file = tmp_path / f"same{suffix}{packing}"
    packed(file, WRITTEN[suffix.lower()](), encoding)
    found = windows([Source(str(file))], tokenizer, samples=9, length=16)
    assert found.sequences == want.sequences
    assert found.domains == ("same",)
    assert found.notes == ()


@pytest.mark.parametrize("name", ["t.txt", "t.TXT", "t.txt.gz"])
@pytest.mark.parametrize("newline", ["\n", "\r\n"])
def test_texts_by_themselves(tokenizer: Any, tmp_path: Path, name: str, newline: str) -> None:
    text = f"{WORDS}\n{WORDS}\né"
    packed(tmp_path / name, text, "utf-8-sig", newline)
    found = windows([Source(str(tmp_path / name))], tokenizer, samples=9, length=16)
    ids = [*tokenizer(text)["input_ids"], tokenizer.eos_token_id]
    flat = [t for row, _ in found.sequences for t in row]
    assert flat == ids[: len(flat)]
    assert len(flat) > 100


def test_lines_that_end_in_crlf(tokenizer: Any, tmp_path: Path) -> None:
    one = lines(tmp_path / "a" / "x.jsonl", *ROWS)
    (tmp_path / "b").mkdir()
    packed(tmp_path / "b" / "x.jsonl", one.read_text(), newline="\r\n")
    assert draw(one, tokenizer).digest == draw(tmp_path / "b" / "x.jsonl", tokenizer).digest


def test_one_object_is_one_row(tokenizer: Any, tmp_path: Path) -> None:
    (tmp_path / "x.json").write_text(json.dumps(ROWS[0], indent=2))
    found = draw(tmp_path / "x.json", tokenizer)
    assert found.sequences == draw(lines(tmp_path / "x.jsonl", ROWS[0]), tokenizer).sequences


def chat(content: Any, **more: Any) -> dict[str, Any]:
    answer = {"role": "assistant", "content": "b"}
    return {"messages": [{"role": "user", "content": content}, answer], **more}


def test_parts_are_what_a_template_of_parts_makes_of_them(tmp_path: Path) -> None:
    """The template that writes parts itself, against ours with the joined text."""
    parts = [{"type": "text", "text": "one two "}, {"type": "text", "text": "three\n"}]
    found = {}
    for name, template, given in (
        ("parts", PARTS, [{"role": "user", "content": parts},
                          {"role": "assistant", "content": [{"type": "text", "text": "b"}]}]),
        ("strings", STRINGS, None),
    ):  # fmt: skip
        own = AutoTokenizer.from_pretrained(MODEL)
        own.chat_template = template
        if given is not None:
            found[name] = tuple(own.apply_chat_template(given, return_dict=True)["input_ids"])
        else:
            text = windows([Source(str(lines(tmp_path / "x.jsonl", chat(parts))))], own, samples=1,
                           length=99)  # fmt: skip
            [(found[name], _)] = text.sequences
    assert found["parts"] == found["strings"]


@pytest.mark.parametrize(
    ("bad", "said"),
    [
        (chat([{"type": "image", "url": "x.png"}, {"type": "text", "text": "a"}]),
         "a part of a message is 'image', and only text is read"),
        (chat([{"type": "image_url", "image_url": {"url": "x"}}]), "is 'image_url'"),
        (chat([{"type": "text"}]), "a part of a message holds no text"),
        (chat([7]), "a part of a message is 7"),
        (chat(5), 'the "content" of a message is 5 and must be text'),
        (chat(None), 'the "content" of a message is None'),
        (chat({"a": "x" * 999}), 'the "content" of a message is {'),
        (chat("a", tools="{"), '"tools" is not JSON'),
        (chat("a", tools={"a": 1}), '"tools" is {\'a\': 1} and must be a list of objects'),
        ({"messages": [{"role": "user"}]}, '"messages" must be a list of messages'),
        ({"messages": "hello"}, '"messages" must be a list of messages'),
        ({"text": "\ud800"}, "half a surrogate pair"),
        (chat("\ud800"), "half a surrogate pair"),
        ({"text": 5, "a" * 500: 1}, '"messages" nor other known ones; its fields are text, aaa'),
        ("{", "not JSON"), ("[" * 9999, "not JSON"), ("7", "expected an object"),
        ('"text"', "expected an object"), ("[]", "expected an object"),
        ({"text": "a", "domain": 5}, '"domain" is 5 and must be a name'),
    ],
)  # fmt: skip
def test_a_bad_row_is_skipped_and_said(
    tokenizer: Any, tmp_path: Path, bad: object, said: str
) -> None:
    good = [chat(WORDS), chat("hello")]
    without = draw(lines(tmp_path / "a" / "x.jsonl", *good), tokenizer)
    file = lines(tmp_path / "b" / "x.jsonl", good[0], bad, bad, good[1])
    found = draw(file, tokenizer)
    assert found.sequences == without.sequences
    [note] = [n for n in found.notes if " skipped; " in n]
    assert note.startswith(f"{file}: 2 rows skipped; the first: {file}, line 2: ")
    assert said in note
    assert len(note) < 400 + 2 * len(str(file))
    with pytest.raises(ValueError) as e:
        draw(lines(tmp_path / "x.jsonl", bad, bad), tokenizer)
    assert f"{tmp_path / 'x.jsonl'}, line 1: " in str(e.value)
    assert said in str(e.value)
    assert "none of its 2 rows can be used" in str(e.value)


def test_bytes_that_are_not_utf8(tokenizer: Any, tmp_path: Path) -> None:
    file = tmp_path / "x.jsonl"
    good = json.dumps({"text": WORDS}).encode()
    file.write_bytes(good + b'\n{"text": "\xff\xfe"}\n' + good)
    found = draw(file, tokenizer)
    assert "1 row skipped; the first: " in found.notes[-1]
    assert "line 2: not JSON: the text is not UTF-8" in found.notes[-1]
    (tmp_path / "x.txt").write_bytes(b"\xff\xfea\0b\0")
    with pytest.raises(ValueError, match=r"x\.txt: the text is not UTF-8"):
        draw(tmp_path / "x.txt", tokenizer)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("text,n\na,1\nb\n", "line 3: 1 fields, and the header has 2"),
        ('text,n\na,1\n"b"x,2\n', "line 3: not CSV"),
        ('text,n\na,1\n"b,2\n\nc,3\n', "line 3: not CSV: unexpected end of data"),
        ("text,n\na,1\n,2\n", 'line 3: neither "text"'),
        ('text,n\n"a\nb",1\n,2\n', 'line 4: neither "text"'),
    ],
)
def test_csv_rows_by_their_lines(tokenizer: Any, tmp_path: Path, text: str, said: str) -> None:
    (tmp_path / "x.csv").write_text(text)
    with pytest.raises(ValueError, match="too little text") as e:
        draw(tmp_path / "x.csv", tokenizer, length=900)
    assert said in str(e.value)


def test_csv_without_text(tokenizer: Any, tmp_path: Path) -> None:
    (tmp_path / "x.csv").write_text("body;n\na;1\n")
    with pytest.raises(ValueError, match=r'line 2: neither "text" nor "messages".*body;n'):
        draw(tmp_path / "x.csv", tokenizer)
    (tmp_path / "x.csv").write_text("text\n")
    with pytest.raises(ValueError, match="holds no rows"):
        draw(tmp_path / "x.csv", tokenizer)


def test_a_cell_longer_than_pythons_limit(tokenizer: Any, tmp_path: Path) -> None:
    (tmp_path / "x.csv").write_text(f"text\n{WORDS * 500}\n")
    assert len(draw(tmp_path / "x.csv", tokenizer).sequences) == 8


@pytest.mark.parametrize("cut", [5, 40, -9])
def test_damaged_gz(tokenizer: Any, tmp_path: Path, cut: int) -> None:
    file = tmp_path / "x.jsonl.gz"
    packed(file, "\n".join(map(json.dumps, ROWS)))
    file.write_bytes(file.read_bytes()[:cut])
    with pytest.raises(ValueError, match=r"x\.jsonl\.gz: cannot be read as calibration text"):
        draw(file, tokenizer)
    file.write_bytes(b"no gz at all")
    with pytest.raises(ValueError, match="cannot be read as calibration text"):
        draw(file, tokenizer)


def test_a_directory_with_strays(tokenizer: Any, tmp_path: Path) -> None:
    folder = tmp_path / "text"
    want = draw(lines(folder / "good.jsonl", *ROWS).parent, tokenizer)
    (folder / "._good.jsonl").write_bytes(b"\0\5\x16\7")
    (folder / "empty.jsonl").touch()
    (folder / "gone.jsonl").symlink_to(tmp_path / "nowhere")
    (folder / "README.md").write_text("# text")
    lines(folder / ".cache" / "old.jsonl", *ROWS)
    lines(tmp_path / "elsewhere" / "more.jsonl", *ROWS)
    (folder / "linked").symlink_to(tmp_path / "elsewhere")
    os.mkfifo(folder / "pipe.jsonl")
    (folder / "garbage.parquet").write_bytes(b"nothing")
    (folder / "garbage.jsonl").write_text("nothing\nat all\n")
    (folder / "config.json").write_text('{"hidden_size": 5}')
    found = draw(folder, tokenizer)
    assert found.digest == want.digest
    skipped, others = found.notes[len(want.notes) :]
    assert skipped.startswith(f"{folder}: 3 files skipped; the first: {folder / 'config.json'}: ")
    assert others == (
        f"{folder}: not read: 1 dangling link, 1 device or pipe, 1 empty file, "
        "1 file of another kind, 1 hidden file, 1 hidden folder, 1 linked folder"
    )
    (folder / "good.jsonl").unlink()
    with pytest.raises(ValueError, match=r"none of its 3 files can be used; .*hidden_size"):
        draw(folder, tokenizer)


def test_a_linked_file_is_read(tokenizer: Any, tmp_path: Path) -> None:
    """The Hub's cache is made of them."""
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "x.jsonl").symlink_to(lines(tmp_path / "x.jsonl", *ROWS))
    assert draw(tmp_path / "a", tokenizer).domains == ("x",)


def test_equal_names_in_subfolders_are_two_domains(tokenizer: Any, tmp_path: Path) -> None:
    for name, word in (("a/train", "one "), ("b/train", "two "), ("b/other", "three ")):
        lines(tmp_path / f"{name}.jsonl", {"text": word * 99})
    found = draw(tmp_path, tokenizer, samples=6)
    assert found.domains == ("a/train", "other", "b/train")
    said = {found.domains[d]: tokenizer.decode(ids).split()[0] for ids, d in found.sequences}
    assert said == {"a/train": "one", "b/train": "two", "other": "three"}
    # one name for the whole directory is still one domain
    assert draw(f"all={tmp_path}", tokenizer).domains == ("all",)


def test_a_file_with_too_little_text_does_not_refuse_a_directory(
    tokenizer: Any, tmp_path: Path
) -> None:
    lines(tmp_path / "a.jsonl", *ROWS)
    lines(tmp_path / "b.jsonl", {"text": "two"})
    found = draw(tmp_path, tokenizer)
    assert found.domains == ("a",)
    assert "too little text for one sample of 16 tokens, left out: b" in found.notes
    with pytest.raises(ValueError, match=r"b\.jsonl: too little text"):
        sample(
            [parse_source(str(tmp_path / f)) for f in ("a.jsonl", "b.jsonl")], tokenizer,
            samples=8, length=16, seed=0,
        )  # fmt: skip


def test_many_domains(tokenizer: Any, tmp_path: Path) -> None:
    rows = [{"text": WORDS, "domain": f"d{i:03d}"} for i in range(200)]
    file = lines(tmp_path / "x.jsonl", *rows)
    found = draw(file, tokenizer, samples=40)
    assert len(found.domains) == 40  # no sums for those without a sequence
    assert {d for _, d in found.sequences} == set(range(40))
    assert "160 of 200 domains get none of the 40 samples" in found.notes[0]
    more = lines(tmp_path / "y.jsonl", *({"text": "a", "domain": f"d{i}"} for i in range(5000)))
    started = time.perf_counter()
    with pytest.raises(ValueError, match=f"5,000 calibration domains, .* NAME={more}"):
        draw(more, tokenizer)
    assert time.perf_counter() - started < 5
    assert draw(f"one={more}", tokenizer).domains == ("one",)


def test_domains_in_every_format(tokenizer: Any, tmp_path: Path) -> None:
    rows = [{"text": WORDS, "domain": d} for d in ("b", "a", None)]
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "x.parquet")
    (tmp_path / "x.json").write_text(json.dumps(rows))
    (tmp_path / "x.csv").write_text(f"domain,text\nb,{WORDS}\na,{WORDS}\n,{WORDS}\n")
    want = draw(lines(tmp_path / "x.jsonl", *rows), tokenizer)
    assert want.domains == ("a", "b", "x")
    for suffix in ("parquet", "json", "csv"):
        assert draw(tmp_path / f"x.{suffix}", tokenizer).digest == want.digest


def test_other_fields_are_named_once(tokenizer: Any, tmp_path: Path) -> None:
    rows = [{"text": WORDS, "meta": {}, "url": "x", "none": None}, {"text": WORDS, "meta": 1}]
    file = lines(tmp_path / "x.jsonl", *rows)
    assert draw(file, tokenizer).notes == (f"{file}: fields not used: meta, url",)


TOOLS = [{"type": "function", "function": {"name": "f", "parameters": {}}}]


@pytest.mark.parametrize("tools", [TOOLS, json.dumps(TOOLS)])
def test_tools_reach_the_template(tmp_path: Path, tools: Any) -> None:
    own = AutoTokenizer.from_pretrained(MODEL)
    own.chat_template = "{% if tools %}{{ tools | tojson }}{% endif %}" + STRINGS
    given = chat("a", tools=tools)
    file = lines(tmp_path / "x.jsonl", given)
    text = windows([Source(str(file))], own, samples=1, length=999)
    want = own.apply_chat_template(given["messages"], tools=TOOLS, return_dict=True)["input_ids"]
    assert text.sequences == ((tuple(want), 0),)
    assert text.notes == ()
    own.chat_template = STRINGS
    [note] = windows([Source(str(file))], own, samples=1, length=999).notes
    assert "fields not used: tools (the chat template has no place for them)" in note


def test_tool_calls_have_no_content(tmp_path: Path) -> None:
    """As OpenAI writes them: null where there is no value."""
    own = AutoTokenizer.from_pretrained(MODEL)
    own.chat_template = (
        "{% for m in messages %}{{ m.keys() | list }}{% if not m.content %}"
        "{{ m.tool_calls[0].name }}{% else %}{{ m.content }}{% endif %}{% endfor %}"
    )
    messages = [
        {"role": "user", "content": "a", "tool_calls": None, "name": None},
        {"role": "assistant", "content": None, "tool_calls": [{"name": "f"}]},
    ]
    file = lines(tmp_path / "x.jsonl", {"messages": messages})
    [(ids, _)] = windows([Source(str(file))], own, samples=1, length=999).sequences
    assert own.decode(ids) == "['role', 'content']a['role', 'tool_calls']f"


def test_chats_that_the_template_refuses_are_skipped(tmp_path: Path) -> None:
    own = AutoTokenizer.from_pretrained(MODEL)
    own.chat_template = (
        "{% if messages[0].role != 'user' %}{{ raise_exception('no') }}{% endif %}" + (STRINGS)
    )
    bad = {"messages": [{"role": "system", "content": "x"}]}
    file = lines(tmp_path / "x.jsonl", bad, chat("a"), bad)
    found = windows([Source(str(file))], own, samples=9, length=99)
    assert len(found.sequences) == 1
    assert found.notes == (
        f"{file}: 2 rows skipped; the first: {file}, line 1: "
        "a chat does not fit the chat template: no",
    )
    with pytest.raises(ValueError, match="line 1: a chat does not fit the chat template: no"):
        windows([Source(str(lines(file, bad)))], own, samples=9, length=99)


@pytest.mark.slow
@pytest.mark.nightly
def test_a_line_of_twenty_megabytes(tokenizer: Any, tmp_path: Path) -> None:
    """Only as much of it is tokenised as is needed; held-out windows have the whole's tokens, from
    its beginning, and sequences that are drawn are of it, from somewhere."""
    text = "".join(f"word{n % 977} and {n},\n" for n in range(1_250_000))
    assert len(text) > 20_000_000
    file = lines(tmp_path / "x.jsonl", {"text": text})
    started = time.perf_counter()
    found = draw(file, tokenizer, samples=64, length=64)
    assert time.perf_counter() - started < 10
    assert len(set(found.sequences)) == 64
    assert all(tokenizer.decode(ids) in text for ids, _ in found.sequences)
    started = time.perf_counter()
    held = windows([Source(str(file))], tokenizer, samples=64, length=64)
    assert time.perf_counter() - started < 10
    want = tokenizer(text[:200_000])["input_ids"][: 64 * 64]
    assert [t for ids, _ in held.sequences for t in ids] == want
    spaces = lines(tmp_path / "y.jsonl", {"text": " " * 3_000_000 + "end " * 50})
    assert len(draw(spaces, tokenizer, length=4, samples=50_000).sequences) > 10


def test_data_sets_of_the_hub_are_read_alike(tmp_path: Path) -> None:
    from moe_fair.moe.hub_rows import PATIENCE, hub_rows
    from moe_fair.moe.left_out import LeftOut

    good = {"text": "a", "meta": "m", "messages": None}
    lines(tmp_path / "x.jsonl", good, {"text": None, "meta": "m"}, good)
    left = LeftOut()
    rows = list(hub_rows(str(tmp_path), None, "train", None, left))
    assert [r.document for r in rows] == ["a", "a"]
    assert left.notes("x") == [
        f"x: 1 row skipped; the first: {tmp_path}, row 2: "
        'neither "text" nor "messages" nor other known ones; its fields are text, meta, messages; '
        "say which is what: --map user=FIELD,assistant=FIELD",
        "x: fields not used: meta",
    ]
    lines(tmp_path / "x.jsonl", *[{"question": "a"}] * (PATIENCE + 50))
    with pytest.raises(ValueError, match=r"are question; nearest: .*; nor can the next 999 rows"):
        list(hub_rows(str(tmp_path), None, "train", None, LeftOut()))


@pytest.mark.parametrize(
    ("spec", "source"),
    [
        ("code=/data/lang=py/x.jsonl", Source("/data/lang=py/x.jsonl", "code")),
        ("/data/lang=py/x.jsonl", Source("/data/lang=py/x.jsonl")),
        ("code=/data/lang=py/x.jsonl:2", Source("/data/lang=py/x.jsonl", "code", 2.0)),
        ("user/ds:2024", Source("user/ds", config="2024")),
        ("user/ds:2", Source("user/ds", config="2")),
        ("user/ds:2024:2", Source("user/ds", None, 2.0, "2024")),
        ("user/ds@train:2", Source("user/ds", None, 2.0)),
        ("user/ds:2024@test:.5", Source("user/ds", None, 0.5, "2024", "test")),
        ("missing.jsonl:2", Source("missing.jsonl", None, 2.0)),
    ],
)
def test_what_a_source_says(spec: str, source: Source) -> None:
    assert parse_source(spec) == source


def test_a_path_that_is_there_is_that_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    lines(Path("lang=py/x.jsonl"), *ROWS)
    lines(Path("a:2.jsonl"), *ROWS)
    assert parse_source("lang=py/x.jsonl") == Source("lang=py/x.jsonl")
    assert parse_source("a:2.jsonl") == Source("a:2.jsonl")
    assert parse_source("c=a:2.jsonl:3") == Source("a:2.jsonl", "c", 3.0)
    for wrong in ("x", "1e3", "nan", ""):
        with pytest.raises(ValueError, match=r"the weight .* is not a number"):
            parse_source(f"lang=py/x.jsonl:{wrong}")
    with pytest.raises(ValueError, match="must be above 0") as e:
        parse_source("lang=py/x.jsonl:" + "9" * 500)
    assert len(str(e.value)) < 200
