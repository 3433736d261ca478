"""Recipes, plans, statistics, indices and calibration lines of any content: only ValueError.

MOE_FAIR_FUZZ sets how many of each kind are tried.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

from moe_fair.core.plan import Plan
from moe_fair.core.units import STATISTICS_FORMAT, Statistics
from moe_fair.engines.shards import checkpoint_tensors, shard_files
from moe_fair.moe.calibration import Source, documents, parse_source
from moe_fair.recipe import Recipe, load_recipe

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


def only_value_errors(run: Callable[[], object]) -> bool:
    """True where it passed; anything but ValueError fails the test."""
    try:
        run()
    except ValueError:
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
def test_recipes(folder: Path, text: str) -> None:
    path = folder / "recipe.yaml"
    path.write_text(text, encoding="utf-8", errors="surrogatepass")
    if only_value_errors(lambda: load_recipe(path)):
        made = load_recipe(path)
        assert Recipe(**made.to_dict()) == made


PLAN = {
    "format": "moe_fair.plan/1",
    "groups": [
        {"name": f"layers.{i}", "layer": i, "size": 4, "kept": [0, 2], "tod": None,
         "null_depth": None, "ceiling": None, "removal": [1.0] * 4, "protection": None}
        for i in range(2)
    ],
    "allocator": "tod", "removal": "a", "protection": None, "tolerance": None, "explanation": {},
    "target": {"ratio": 0.5}, "before": {"parameters": 8, "bytes": 16},
    "after": {"parameters": 4, "bytes": 8}, "notes": [],
}  # fmt: skip


@fuzz
@given(data=st.data())
def test_plans(folder: Path, data: st.DataObject) -> None:
    path = folder / "plan.json"
    path.write_text(json.dumps(changed(data, PLAN)))
    if only_value_errors(lambda: Plan.load(path)):
        for g in Plan.load(path).groups:
            assert g.kept == sorted(set(g.kept))
            assert 0 <= g.kept[0] <= g.kept[-1] < g.size


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


lines = st.text(max_size=40) | st.builds(
    json.dumps,
    anything
    | st.fixed_dictionaries({"text": anything})
    | st.fixed_dictionaries({"messages": st.lists(anything, max_size=2)}),
)


@fuzz
@given(text=st.lists(lines, min_size=1, max_size=3).map("\n".join), spec=st.text(max_size=30))
def test_calibration_lines(folder: Path, text: str, spec: str) -> None:
    path = folder / "text.jsonl"
    path.write_text(text, encoding="utf-8", errors="surrogatepass")

    def read() -> None:
        for document in documents(Source(str(path)), 0):
            if isinstance(document, str):
                document.encode()
            else:
                assert all({"role", "content"} <= set(m) for m in document)

    only_value_errors(read)
    only_value_errors(lambda: parse_source(spec))
