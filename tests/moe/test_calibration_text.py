"""Calibration text: sources, domains, weights, packing, chats."""

from __future__ import annotations

import json
import random
import re
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import pytest
from places import CALIBRATION, MODEL
from transformers import AutoTokenizer

from moe_fair.moe.calibration_text import CalibrationSet, sample, split, windows
from moe_fair.moe.text_packing import _Drawn
from moe_fair.moe.text_sources import Source, parse_source


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return AutoTokenizer.from_pretrained(MODEL)


def draw(specs: list[str], tokenizer: Any, **settings: int) -> CalibrationSet:
    values = {"samples": 4, "length": 16, "seed": 0, **settings}
    return sample([parse_source(s) for s in specs], tokenizer, **values)


@pytest.mark.parametrize(
    ("spec", "source"),
    [
        ("python=code.jsonl:0.5", Source("code.jsonl", "python", 0.5)),
        ("code.jsonl", Source("code.jsonl")),
        ("allenai/c4:en@train", Source("allenai/c4", config="en")),
        ("c4=allenai/c4:en@validation:2", Source("allenai/c4", "c4", 2.0, "en", "validation")),
        ("NeelNanda/pile-10k", Source("NeelNanda/pile-10k")),
    ],
)
def test_how_a_source_is_written(spec: str, source: Source) -> None:
    assert parse_source(spec) == source


def test_a_directory_is_a_domain_a_file(tokenizer: Any) -> None:
    text = draw([str(CALIBRATION)], tokenizer, samples=10)
    assert text.domains == ("javascript", "python", "reference-manuals", "rust-docs")
    counts = [sum(d == i for _, d in text.sequences) for i in range(4)]
    assert counts == [3, 3, 2, 2]


def test_lines_name_their_domains(tokenizer: Any, tmp_path: Path) -> None:
    file = tmp_path / "mixed.jsonl"
    rows = [
        {"text": "one two three " * 30, "domain": "b"},
        {"text": "four five six " * 40, "domain": "a"},
        {"text": 'it says "domain" ' * 30},  # of no domain of its own: that of the file
        {"text": "seven eight " * 40, "domain": "b"},
        {"text": "nine ten " * 30, "domain": None},
    ]
    file.write_text("\n".join(map(json.dumps, rows)))
    text = draw([str(file)], tokenizer, samples=7)
    assert text.domains == ("a", "b", "mixed")
    assert [sum(d == i for _, d in text.sequences) for i in range(3)] == [3, 2, 2]
    told = [set(tokenizer.decode(ids).split()) for ids, _ in text.sequences]
    allowed = [{"four", "five", "six"}, {"one", "two", "three", "seven", "eight"}]
    for words, (_, d) in zip(told, text.sequences, strict=True):
        assert d == 2 or len(words & allowed[d]) > 1
        assert d == 2 or not words & allowed[1 - d]
    one = draw([f"all={file}"], tokenizer, samples=7)  # a name for the whole file wins
    assert one.domains == ("all",)
    assert draw([str(file)], tokenizer, samples=7).digest == text.digest
    held = windows([Source(str(file))], tokenizer, samples=99, length=16)
    assert held.domains == text.domains


@pytest.mark.parametrize("wrong", [5, "", " ", ["a"], {"a": 1}, True])
def test_domains_that_are_no_names(tokenizer: Any, tmp_path: Path, wrong: object) -> None:
    file = tmp_path / "t.jsonl"
    rows = [{"text": "one two " * 30}, {"text": "three " * 30, "domain": wrong}]
    file.write_text("\n".join(map(json.dumps, rows)))
    text = draw([str(file)], tokenizer)
    assert text.domains == ("t",)
    said = next(n for n in text.notes if "skipped" in n)
    assert re.search(r't\.jsonl, line 2: "domain" is .* must be a name', said)
    assert draw([f"all={file}"], tokenizer).domains == ("all",)  # then it is not looked at


def test_lines_without_domains_are_as_before(tokenizer: Any, tmp_path: Path) -> None:
    file = tmp_path / "plain.jsonl"
    file.write_text(json.dumps({"text": "one two three " * 40, "domain": None}))
    assert draw([str(file)], tokenizer).domains == ("plain",)


def test_weights_share_the_samples(tokenizer: Any) -> None:
    python, rust = CALIBRATION / "python.jsonl", CALIBRATION / "rust-docs.jsonl"
    text = draw([f"a={python}:3", f"b={rust}"], tokenizer, samples=8)
    assert [d for _, d in text.sequences] == [0] * 6 + [1] * 2
    assert text.domains == ("a", "b")


def test_packing_loses_and_repeats_nothing(tokenizer: Any, tmp_path: Path) -> None:
    docs = ["one two three " * 9, "four five", "six " * 50]
    (tmp_path / "t.jsonl").write_text("\n".join(json.dumps({"text": d}) for d in docs))
    text = windows([Source(str(tmp_path / "t.jsonl"))], tokenizer, samples=99, length=16)
    stream = []
    for d in docs:
        stream += [*tokenizer(d)["input_ids"], tokenizer.eos_token_id]
    packed = [t for ids, _ in text.sequences for t in ids]
    assert packed == stream[: len(packed)]
    assert len(stream) - len(packed) < 16
    assert all(len(ids) == 16 for ids, _ in text.sequences)


def documents(tokenizer: Any, folder: Path, lengths: list[int]) -> tuple[Path, list[list[int]]]:
    """A file of documents with so many tokens, whatever they are; and these, with their ends."""
    order = random.Random(0)
    rows, tokens = [], []
    for n in lengths:
        words = " ".join(f"{order.choice('abcdefgh')}{order.randrange(100)}" for _ in range(n))
        text = tokenizer.decode(tokenizer(words)["input_ids"][:n])
        rows.append(json.dumps({"text": text}))
        tokens.append([*tokenizer(text)["input_ids"], tokenizer.eos_token_id])
    (folder / "t.jsonl").write_text("\n".join(rows))
    return folder / "t.jsonl", tokens


def place(document: list[int], ids: tuple[int, ...]) -> int:
    """Where in the document the ids are; -1: nowhere."""
    n = len(ids)
    return next((i for i in range(len(document) - n + 1) if document[i : i + n] == [*ids]), -1)


def test_a_long_document_gives_one_sequence_where_there_are_others(
    tokenizer: Any, tmp_path: Path
) -> None:
    file, tokens = documents(tokenizer, tmp_path, [200] * 30 + [6] * 20)
    text = draw([str(file)], tokenizer, samples=20)
    of = [[d for d, t in enumerate(tokens) if place(t, ids) >= 0] for ids, _ in text.sequences]
    assert len(text.sequences) == 20
    whole = [d[0] for d in of if d]
    assert len(set(whole)) == len(whole) >= 10  # the others are packed ends and short documents
    places = {place(tokens[d[0]], ids) for (ids, _), d in zip(text.sequences, of, strict=True) if d}
    assert len(places) > 6  # from anywhere, not the beginning
    assert all(p % 16 == 0 for p in places)
    other = draw([str(file)], tokenizer, samples=20, seed=1)
    assert set(other.sequences) != set(text.sequences)
    # what is held back is of other documents
    left, held = split(text, 4)
    ours = {d for d in whole if any(place(tokens[d], ids) >= 0 for ids, _ in held.sequences)}
    assert ours.isdisjoint(
        d for d in whole if any(place(tokens[d], ids) >= 0 for ids, _ in left.sequences)
    )


def test_few_documents_give_all_they_have_and_each_its_part(tokenizer: Any, tmp_path: Path) -> None:
    file, tokens = documents(tokenizer, tmp_path, [500, 40, 300, 90])
    text = draw([str(file)], tokenizer, samples=999)
    stream = [t for d in tokens for t in d]
    found = sorted(t for ids, _ in text.sequences for t in ids)
    assert len(text.sequences) == len(stream) // 16  # as many as packing gives
    rest = list(stream)
    for t in found:
        rest.remove(t)  # each once
    assert "holds" in text.notes[-1]
    some = draw([str(file)], tokenizer, samples=24)
    counts = [sum(place(t, ids) >= 0 for ids, _ in some.sequences) for t in tokens]
    assert counts[0] - 1 <= counts[2] <= counts[0]  # though one is much longer
    assert counts[1] == 2  # all of it
    assert counts[3] == 5
    # those of a document lie beside one another
    order = [next((d for d, t in enumerate(tokens) if place(t, ids) >= 0), -1)
             for ids, _ in some.sequences]  # fmt: skip
    runs = [d for i, d in enumerate(order) if d >= 0 and (i == 0 or order[i - 1] != d)]
    assert len(runs) <= 4 + order.count(-1)


def test_of_one_huge_document_no_more_than_is_needed_is_kept(
    tokenizer: Any, tmp_path: Path
) -> None:
    file, _ = documents(tokenizer, tmp_path, [20_000])
    drawn = _Drawn(10)
    for n in (300, 7, 500, 1):
        drawn.add([(i,) for i in range(n)], random.Random(0))
    assert sum(map(len, drawn._more)) <= 20
    kept = sorted(len(d) for d in drawn._more)
    assert kept == [2, 2, 2] or kept[-1] - kept[0] <= 1
    assert len(drawn.sequences()) == 10
    assert len(draw([str(file)], tokenizer, samples=64).sequences) == 64


def test_of_huge_documents_a_part_is_tokenised(tokenizer: Any, tmp_path: Path) -> None:
    """But of one alone all that is asked for, whatever is asked for; a blank end does no harm."""
    order = random.Random(0)
    rows = [" ".join(order.choice(["one", "two", "three"]) for _ in range(60_000)) + " " * 80_000
            for _ in range(12)]  # fmt: skip
    file = tmp_path / "t.jsonl"
    file.write_text("\n".join(json.dumps({"text": r}) for r in rows))
    read: list[int] = []

    class Counting:
        def __getattr__(self, name: str) -> Any:
            return getattr(tokenizer, name)

        def __call__(self, text: str, **settings: Any) -> Any:
            read.append(len(text))
            return tokenizer(text, **settings)

    text = draw([str(file)], Counting(), samples=12, length=64)
    assert len(text.sequences) == 12
    assert sum(read) < 14 * 2**16 < sum(map(len, rows)) / 4
    file.write_text(json.dumps({"text": rows[0]}))
    assert len(draw([str(file)], tokenizer, samples=500, length=64).sequences) == 500
    # nor alone among smaller ones, whatever comes first
    small = " ".join(rows[1].split()[:200])
    file.write_text("\n".join(json.dumps({"text": t}) for t in (*[small] * 5, rows[0])))
    for seed in range(4):
        assert len(draw([str(file)], tokenizer, samples=900, length=64, seed=seed).sequences) == 900


def test_the_seed_draws(tokenizer: Any) -> None:
    a, b, c = (draw([str(CALIBRATION)], tokenizer, seed=s) for s in (0, 0, 1))
    assert a == b
    assert a.digest == b.digest != c.digest


def test_another_source_does_not_change_what_one_gives(tokenizer: Any) -> None:
    python, rust = CALIBRATION / "python.jsonl", CALIBRATION / "rust-docs.jsonl"
    alone = draw([str(python)], tokenizer, samples=3)
    both = draw([str(rust), str(python)], tokenizer, samples=6)
    assert [ids for ids, _ in alone.sequences] == [ids for ids, d in both.sequences if d == 1]


def test_chats_go_through_the_template(tokenizer: Any, tmp_path: Path) -> None:
    chats = [
        [{"role": "user", "content": "hello " * n}, {"role": "assistant", "content": "yes"}]
        for n in (1, 5, 90)
    ]
    (tmp_path / "c.jsonl").write_text("\n".join(json.dumps({"messages": c}) for c in chats))
    text = windows([Source(str(tmp_path / "c.jsonl"))], tokenizer, samples=9, length=40)
    rendered = [tokenizer.apply_chat_template(c, tokenize=False) for c in chats]
    want = [tuple(tokenizer(r)["input_ids"])[:40] for r in rendered]
    assert [ids for ids, _ in text.sequences] == want
    batches = text.batches(3)
    assert {
        i: n
        for b in batches
        for i, n in zip(b.sequence_ids.tolist(), b.mask.sum(1).tolist(), strict=True)
    } == {i: len(w) for i, w in enumerate(want)}
    tokenizer = AutoTokenizer.from_pretrained(MODEL)
    tokenizer.chat_template = None
    with pytest.raises(ValueError, match="no chat template"):
        windows([Source(str(tmp_path / "c.jsonl"))], tokenizer, samples=9, length=40)


def test_text_and_parquet_files(tokenizer: Any, tmp_path: Path) -> None:
    words = "alpha beta gamma " * 20
    (tmp_path / "t.txt").write_text(words)
    pyarrow.parquet.write_table(pyarrow.table({"text": [words]}), tmp_path / "t.parquet")
    a, b = (draw([str(tmp_path / f"t.{x}")], tokenizer, samples=2) for x in ("txt", "parquet"))
    assert a.sequences == b.sequences


def test_too_little_for_all_samples_is_said(tokenizer: Any, tmp_path: Path) -> None:
    (tmp_path / "t.txt").write_text("word " * 40)
    text = draw([str(tmp_path / "t.txt")], tokenizer, samples=99)
    assert "of the 99 asked for" in text.notes[0]


def test_little_of_a_batch_is_padding() -> None:
    """However the lengths are spread; every sequence is in one batch, as it is."""
    draw = random.Random(0)
    spread = {
        "even": [draw.randint(4, 512) for _ in range(300)],
        "long tail": [min(16384, int(20 * draw.paretovariate(0.7))) for _ in range(300)],
        "two": [3] * 50 + [400] * 50,
        "few": [1, 2, 500],
    }
    for lengths in spread.values():
        rows = tuple((tuple(range(n)), i % 2) for i, n in enumerate(lengths))
        batches = CalibrationSet(("a", "b"), rows).batches(8)
        seen = sorted(i for b in batches for i in b.sequence_ids.tolist())
        assert seen == list(range(len(rows)))
        for b in batches:
            assert len(b.mask) <= 8
            assert b.mask.float().mean() >= 0.9
            for i, ids, mask in zip(b.sequence_ids.tolist(), b.input_ids, b.mask, strict=True):
                assert tuple(ids[mask.bool()].tolist()) == rows[i][0]
                assert rows[i][1] == b.domain
    # one after another they would be mostly padding
    lengths = spread["even"]
    naive = [lengths[i : i + 8] for i in range(0, 300, 8)]
    assert sum(lengths) / sum(8 * max(n) for n in naive) < 0.7


def test_sequences_of_one_length_are_batched_in_their_order() -> None:
    rows = tuple(((i, i), i % 3 % 2) for i in range(30))
    batches = CalibrationSet(("a", "b"), rows).batches(4)
    for domain in (0, 1):
        ids = [i for i in range(30) if rows[i][1] == domain]
        want = [ids[i : i + 4] for i in range(0, len(ids), 4)]
        assert [b.sequence_ids.tolist() for b in batches if b.domain == domain] == want


def test_samples_of_16k_tokens(tokenizer: Any, tmp_path: Path) -> None:
    """A chat stays whole, documents are packed; a chat that is longer is cut, which is said."""
    chats = [[{"role": "user", "content": "hello " * n}] for n in (3_000, 5_000, 30_000)]
    (tmp_path / "c.jsonl").write_text("\n".join(json.dumps({"messages": c}) for c in chats))
    (tmp_path / "t.jsonl").write_text(json.dumps({"text": "one two three " * 6_000}))
    text = windows([Source(str(tmp_path / f"{n}.jsonl")) for n in "ct"], tokenizer, samples=6,
                   length=16384)  # fmt: skip
    lengths = [len(ids) for ids, _ in text.sequences]
    assert lengths[2:] == [16384] * len(lengths[2:])
    assert 3_000 < lengths[0] < lengths[1] < 16384
    assert any("1 chat cut to --length" in n for n in text.notes)


def test_batches_hold_one_domain_each(tokenizer: Any) -> None:
    text = draw([str(CALIBRATION)], tokenizer, samples=10)
    batches = text.batches(2)
    assert [len(b.sequence_ids) for b in batches] == [2, 1, 2, 1, 2, 2]
    seen = sorted(i for b in batches for i in b.sequence_ids.tolist())
    assert seen == list(range(10))
    for b in batches:
        assert all(text.sequences[i][1] == b.domain for i in b.sequence_ids.tolist())
