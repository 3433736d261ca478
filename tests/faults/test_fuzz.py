"""Recipes, plans, statistics, indices and calibration rows of any content: only ValueError.

MOE_FAIR_FUZZ sets how many of each kind are tried.
"""

from __future__ import annotations

import gzip
import json
import os
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

from moe_fair.core.plan import ModelSize, Plan, Target, make_plan
from moe_fair.core.plan_checks import check_fits
from moe_fair.core.recipe import Recipe
from moe_fair.core.recipe_file import load_recipe
from moe_fair.core.units import STATISTICS_FORMAT, Scores, Statistics, UnitGroup
from moe_fair.engines.shards import checkpoint_tensors, shard_files
from moe_fair.moe.row_files import read_rows
from moe_fair.moe.rows import BadRow
from moe_fair.moe.schemas import SCHEMAS, SPEAKERS, Chat
from moe_fair.moe.text_sources import Source, expand, parse_source

EXAMPLES = int(os.environ.get("MOE_FAIR_FUZZ", "60"))
fuzz = settings(
    max_examples=EXAMPLES, deadline=None, derandomize="MOE_FAIR_FUZZ" not in os.environ,
    suppress_health_check=list(HealthCheck), database=None,
)  # fmt: skip

numbers = st.integers() | st.floats() | st.sampled_from([0, 1, -1, 2, 10**400, 2**63])
plain = st.none() | st.booleans() | numbers | st.text(max_size=20)
anything = st.recursive(
    plain,
    lambda x: st.lists(x, max_size=4) | st.dictionaries(st.text(max_size=8), x, max_size=4),
    max_leaves=8,
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("fuzz")


def only_value_errors(run: Callable[[], object], most: int | None = None) -> bool:
    """True where it passed; anything but ValueError, or one that says more, fails the test."""
    try:
        run()
    except ValueError as e:
        if most is not None and len(str(e)) > most:
            raise AssertionError(f"{len(str(e))} characters") from e
        return False
    return True


def changed(data: st.DataObject, value: Any) -> Any:
    """The value with something in it replaced or left out."""
    if isinstance(value, dict) and value and data.draw(st.integers(0, 4)):
        key = data.draw(st.sampled_from(sorted(value)))
        if not data.draw(st.integers(0, 4)):
            return {k: v for k, v in value.items() if k != key}
        return value | {key: changed(data, value[key])}
    if isinstance(value, list) and value and data.draw(st.integers(0, 3)):
        i = data.draw(st.integers(0, len(value) - 1))
        return [*value[:i], changed(data, value[i]), *value[i + 1 :]]
    return data.draw(anything)


TAGS = [
    "!!int ",
    "!!float ",
    "!!timestamp ",
    "!!binary ",
    "!!set ",
    "!!python/name:os ",
    "&a ",
    "*a",
]
values = st.builds(lambda t, v: t + json.dumps(v), st.sampled_from(["", "", *TAGS]), anything)
settings_lines = st.lists(
    st.tuples(st.sampled_from(sorted(Recipe.__dataclass_fields__)) | st.text(max_size=8), values),
    max_size=4,
).map(lambda pairs: "\n".join(f"{k}: {v}" for k, v in pairs))


@fuzz
@given(text=settings_lines | st.text(max_size=60))
@pytest.mark.slow
def test_recipes(folder: Path, text: str) -> None:
    path = folder / "recipe.yaml"
    path.write_text(text, encoding="utf-8", errors="surrogatepass")
    if only_value_errors(lambda: load_recipe(path)):
        made = load_recipe(path)
        assert Recipe(**made.to_dict()) == made


UNITS = tuple(UnitGroup(f"layers.{i}", i, 4, unit_parameters=10, unit_bytes=20) for i in range(3))
SIZE = ModelSize(1000, 2000)
SCORES = Scores("a", {g.name: torch.tensor([3.0, 1.0, 4.0, 1.5]) for g in UNITS})
PLANS = [
    json.loads(make_plan(UNITS, SCORES, SCORES, target=t, allocator=a, before=SIZE).to_json())
    for t, a in (
        (Target(ratio=0.5), "uniform"), (Target(total=7), "tod"), (Target(bytes=1900), "global"),
        (Target(mean_kept=3), "global"), (Target(tolerance=0.4), "tod"),
    )
]  # fmt: skip
few = st.integers(-1, 6) | st.floats(allow_nan=True) | st.sampled_from([True, None, "1", 10**400])


def one_change(data: st.DataObject, value: Any) -> tuple[Any, set[str]]:
    """The value with one field changed, doubled or left out, and the keys that lead to it."""
    if isinstance(value, dict) and value and data.draw(st.integers(0, 9)):
        key = data.draw(st.sampled_from(sorted(value)))
        if not data.draw(st.integers(0, 9)):
            return {k: v for k, v in value.items() if k != key}, {key}
        inner, path = one_change(data, value[key])
        return value | {key: inner}, path | {key}
    if isinstance(value, list) and value and data.draw(st.integers(0, 9)):
        i = data.draw(st.integers(0, len(value) - 1))
        how = data.draw(st.sampled_from(["change", "change", "change", "drop", "double"]))
        if how != "change":
            return value[:i] + [value[i]] * (2 * (how == "double")) + value[i + 1 :], set()
        inner, path = one_change(data, value[i])
        return [*value[:i], inner, *value[i + 1 :]], path
    return data.draw(few | anything), set()


@fuzz
@given(data=st.data())
def test_tampered_plans(folder: Path, data: st.DataObject) -> None:
    """A plan with one field changed is refused, or cuts as many units of every model as it says."""
    valid = data.draw(st.sampled_from(PLANS))
    raw, path = one_change(data, valid)
    file = folder / "tampered.json"
    file.write_text(json.dumps(raw))

    def load() -> Plan:
        plan = Plan.load(file)
        check_fits(plan, UNITS, SIZE)
        return plan

    if only_value_errors(lambda: Plan.load(file)):  # what the plan alone can tell
        alone = Plan.load(file)
        total = alone.target.get("total", alone.target.get("mean_kept", 0) * len(alone.groups))
        assert not total or sum(len(g.kept) for g in alone.groups) == total
        assert all(len(g.removal) == g.size for g in alone.groups)
    if not only_value_errors(load):
        return
    found = load()
    assert {g.name: (g.layer, g.size) for g in found.groups} == {
        g.name: (g.layer, g.size) for g in UNITS
    }
    gone = 0
    for g in found.groups:
        assert all(type(i) is int for i in g.kept)
        assert sorted({*g.kept} & {*range(4)}) == g.kept
        assert [type(x) in (int, float) for x in g.removal] == [True] * 4
        gone += 4 - len(g.kept)
    assert asdict(found.before) == {"parameters": 1000, "bytes": 2000}
    assert asdict(found.after) == {"parameters": 1000 - 10 * gone, "bytes": 2000 - 20 * gone}
    if not path & {"kept", "merged"}:  # another field was changed, and it cuts the same
        assert found.kept == {g["name"]: g["kept"] for g in valid["groups"]}
    elif "merged" not in path:  # other ids, as many
        assert gone == sum(4 - len(g["kept"]) for g in valid["groups"])


HEADER = {
    "format": STATISTICS_FORMAT,
    "groups": [{"name": "layers.0", "layer": 0, "size": 4, "floor": 2}],
    "domains": ["a"], "fingerprint": {"model": "x"}, "facts": {"size": {"parameters": 1}},
}  # fmt: skip


@fuzz
@given(data=st.data())
def test_statistics_headers(folder: Path, data: st.DataObject) -> None:
    length = data.draw(st.sampled_from([4, 4, 3]))
    kind = data.draw(st.sampled_from([torch.float64, torch.float64, torch.float32]))
    tensors = {
        "sequence_ids": torch.arange(2), "sequence_domains": torch.zeros(2, dtype=torch.int64),
        "tokens": torch.ones(1, dtype=kind), "sequences": torch.ones(1, dtype=kind),
        "sums/layers.0/tokens": torch.ones(1, length, dtype=kind),
        "rows/layers.0": torch.ones(2, length, dtype=kind),
    }  # fmt: skip
    gone = data.draw(st.sampled_from([None, None, None, *tensors]))
    path = folder / "statistics.safetensors"
    header = json.dumps(changed(data, HEADER))
    save_file({k: t for k, t in tensors.items() if k != gone}, path, {"moe_fair": header})
    if only_value_errors(lambda: Statistics.load(path)):
        found = Statistics.load(path)
        for g in found.groups:
            assert found.view(g)["tokens"].shape == (g.size,)


INDEX = {
    "metadata": {"total_size": 8},
    "weight_map": {"a": "one.safetensors", "b": "two.safetensors"},
}


@fuzz
@given(data=st.data())
def test_shard_indices(folder: Path, data: st.DataObject) -> None:
    if not (folder / "two.safetensors").exists():
        save_file({"a": torch.ones(2)}, folder / "one.safetensors")
        save_file({"b": torch.ones(2)}, folder / "two.safetensors")
    (folder / "model.safetensors.index.json").write_text(json.dumps(changed(data, INDEX)))

    def read() -> list[str]:
        return [t.name for t in checkpoint_tensors(folder, shard_files(folder))]

    if only_value_errors(read):
        assert {p.parent for p in shard_files(folder)} == {folder}


HEADER_ENTRIES = {
    "a": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]},
    "b": {"dtype": "BF16", "shape": [2, 2], "data_offsets": [8, 16]},
}


@fuzz
@given(data=st.data())
def test_safetensors_headers(folder: Path, data: st.DataObject) -> None:
    home = folder / "headers"
    home.mkdir(exist_ok=True)
    text = json.dumps(changed(data, HEADER_ENTRIES)).encode()
    length = len(text) + data.draw(st.sampled_from([0, 0, 0, -1, 1, 2**40]))
    (home / "model.safetensors").write_bytes(length.to_bytes(8, "little") + text + bytes(16))

    def read() -> None:
        for t in checkpoint_tensors(home, shard_files(home)):
            [piece] = t.pieces
            assert 0 <= piece.start <= piece.start + piece.length
            assert piece.start + piece.length <= piece.file.stat().st_size

    only_value_errors(read)


parts = anything | st.fixed_dictionaries(
    {"type": st.sampled_from(["text", "image"]), "text": anything}
)
messages = st.fixed_dictionaries(
    {"role": st.sampled_from(["user", "tool"]) | anything, "content": st.lists(parts) | anything},
    optional={"tool_calls": anything, "name": anything},
)
shared = st.fixed_dictionaries(
    {"from": st.sampled_from([*SPEAKERS, "x"]) | anything, "value": st.text() | anything}
)
call = st.fixed_dictionaries({"name": st.text() | anything}, optional={"arguments": anything})
contents = st.lists(messages | shared, max_size=2) | st.lists(call, max_size=2)
contents |= contents.map(json.dumps) | st.text() | anything
FIELDS = sorted({f for s in SCHEMAS for f in s.needs} | {"input", "context", "system", "other"})
rows = anything | st.fixed_dictionaries(
    {},
    optional={"text": st.text() | anything, "messages": st.lists(messages, max_size=2) | anything,
              "tools": anything, "domain": st.text(max_size=4) | anything, "other": anything},
) | st.sampled_from(SCHEMAS).flatmap(
    lambda s: st.fixed_dictionaries(
        dict.fromkeys(s.needs, contents),
        optional=dict.fromkeys([f for f in [*FIELDS, "tools"] if f not in s.needs], contents),
    )
)  # fmt: skip
WRITERS: dict[str, Callable[[list[Any]], str]] = {
    ".txt": str,
    ".jsonl": lambda rows: "\r\n".join(map(json.dumps, rows)),
    ".json": json.dumps,
    ".csv": lambda rows: "text,domain\n" + "\n".join(f'"{r}",{r!r}' for r in rows),
}


def damaged(data: st.DataObject, content: bytes) -> bytes:
    """The bytes, sometimes with some of them cut out or put in."""
    if data.draw(st.integers(0, 3)):
        return content
    at = data.draw(st.integers(0, len(content)))
    gone = data.draw(st.integers(0, 8))
    return content[:at] + data.draw(st.binary(max_size=4)) + content[at + gone :]


@fuzz
@given(data=st.data(), found=st.lists(rows, max_size=4), suffix=st.sampled_from(sorted(WRITERS)))
def test_calibration_rows(folder: Path, data: st.DataObject, found: list[Any], suffix: str) -> None:
    text = data.draw(st.text(max_size=60)) if not data.draw(st.integers(0, 5)) else None
    written = (WRITERS[suffix](found) if text is None else text).encode(errors="surrogatepass")
    path = folder / f"rows{suffix}"
    content = damaged(data, data.draw(st.sampled_from([b"", b"\xef\xbb\xbf"])) + written)
    if data.draw(st.booleans()):
        path = folder / f"rows{suffix}.gz"
        content = damaged(data, gzip.compress(content, mtime=0))
    path.write_bytes(content)

    def read() -> None:
        for _, row in read_rows(path):
            if isinstance(row, BadRow):
                assert row.why
                assert len(row.why) < 300
                assert "\n" not in row.why
            elif isinstance(row.document, Chat):
                for m in row.document.messages:
                    assert isinstance(m["role"], str)
                    assert isinstance(m.get("content"), str) or m["tool_calls"]
                json.dumps(row.document.messages, ensure_ascii=False).encode()
            else:
                row.document.encode()

    only_value_errors(read)
    only_value_errors(lambda: expand([Source(str(path))]))


@fuzz
@given(data=st.data(), found=st.lists(rows, min_size=1, max_size=4))
@pytest.mark.slow
def test_parquet_rows(folder: Path, data: st.DataObject, found: list[Any]) -> None:
    texts = [r.get("text") if isinstance(r, dict) else r for r in found]
    table = pyarrow.table({"text": [t if isinstance(t, str) and safe(t) else None for t in texts]})
    pyarrow.parquet.write_table(table, folder / "rows.parquet")
    path = folder / "damaged.parquet"
    path.write_bytes(damaged(data, (folder / "rows.parquet").read_bytes()))
    only_value_errors(lambda: list(read_rows(path)))


def safe(text: str) -> bool:
    return not any("\ud800" <= c <= "\udfff" for c in text)


@fuzz
@given(spec=st.text(max_size=30) | st.from_regex(r"\A([a=:@/.]|[0-9]{1,3}|x\.jsonl){1,8}\Z"))
def test_sources(spec: str) -> None:
    if only_value_errors(lambda: parse_source(spec)):
        found = parse_source(spec)
        assert 0 < found.weight < float("inf")
        assert found.where


anchored = st.recursive(
    st.sampled_from(["*a", "*b", "1", "x", "050", ".nan", "{<<: *a}", "!!int 7", "'q'"]),
    lambda x: (
        st.builds(lambda tag, v: tag + v, st.sampled_from(["&a ", "&b ", ""]), x)
        | st.lists(x, max_size=9).map(lambda v: f"[{', '.join(v)}]")
        | st.lists(x, max_size=3).map(
            lambda v: "{" + ", ".join(f"k{i % 2}: {w}" for i, w in enumerate(v)) + "}"
        )
    ),
    max_leaves=30,
)


@fuzz
@given(
    pairs=st.lists(
        st.tuples(st.sampled_from(["model", "seed", "weights", "calibration", "ratio"]), anchored),
        min_size=1, max_size=4,
    )
)  # fmt: skip
def test_recipes_with_aliases(folder: Path, pairs: list[tuple[str, str]]) -> None:
    path = folder / "aliases.yaml"
    path.write_text("\n".join(f"{k}: {v}" for k, v in pairs))
    if only_value_errors(lambda: load_recipe(path), most=300 + 2 * len(str(path))):
        assert len({k for k, _ in pairs}) == len(pairs)
        assert "*" not in "".join(v for _, v in pairs)
        made = load_recipe(path)
        assert Recipe(**made.to_dict()) == made
