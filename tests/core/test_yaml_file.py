"""Settings in YAML: what has two meanings or is larger than its text is refused in a short line."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from moe_fair.cli.vision import _written
from moe_fair.core.quote import quote
from moe_fair.core.recipe import Recipe
from moe_fair.core.recipe_file import load_recipe
from moe_fair.core.yaml_file import read_yaml
from moe_fair.moe.device_map import read_map
from moe_fair.publish.card import read_metadata
from moe_fair.vision.settings import Settings
from moe_fair.vision.sparse.settings import SparseSettings

# every reader of settings
READERS: dict[str, Callable[[Path], Any]] = {
    "recipe": load_recipe,
    "vision": lambda path: _written(path, Settings),
    "sparse": lambda path: _written(path, SparseSettings),
    "map": lambda path: read_map(str(path)),
}


LONG = "x" * 5000


def bomb(key: str, levels: int = 12) -> str:
    """A list of lists of ... of nine each: 9**12 texts."""
    rows = ["a: &a0 [x, x, x, x, x, x, x, x, x]"]
    for i in range(levels):
        rows.append(f"b{i}: &a{i + 1} [{', '.join([f'*a{i}'] * 9)}]")
    return "\n".join([*rows, f"{key}: *a{levels}"])


def within(key: str, levels: int = 12) -> str:
    """The same as the value of one known key: no other key is there to be refused first."""
    text = "&a0 [x, x, x, x, x, x, x, x, x]"
    for i in range(levels):
        text = f"&a{i + 1} [{text}, {', '.join([f'*a{i}'] * 8)}]"
    return f"{key}: {text}"


def merges(levels: int = 24) -> str:
    rows = ["m0: &m0 {a: 1}"]
    rows += [f"m{i + 1}: &m{i + 1} {{<<: [*m{i}, *m{i}, *m{i}]}}" for i in range(levels)]
    return "\n".join(rows)


def refused(read: Callable[[Path], Any], path: Path, text: str) -> str:
    path.write_text(text)
    started = time.process_time()
    with pytest.raises(ValueError) as e:
        read(path)
    assert time.process_time() - started < 2
    said = str(e.value)
    assert len(said) < 300 + len(str(path))
    assert "\n" not in said
    return said


@pytest.mark.parametrize("reader", READERS)
@pytest.mark.parametrize("text", [bomb("model"), within("model"), within("seed"), merges()])
def test_bombs(tmp_path: Path, reader: str, text: str) -> None:
    said = refused(READERS[reader], tmp_path / "recipe.yaml", text)
    assert "an alias (*" in said
    assert "write the value out" in said


def test_a_card_of_merges_is_passed_over(tmp_path: Path) -> None:
    (tmp_path / "README.md").write_text(f"---\n{merges()}\n---\n")
    started = time.process_time()
    assert read_metadata(tmp_path / "README.md") == {}
    assert time.process_time() - started < 2
    (tmp_path / "README.md").write_text("---\nlicense: mit\nlicense: mit\n---\n")
    assert read_metadata(tmp_path / "README.md") == {"license": "mit"}  # others wrote it


@pytest.mark.parametrize("reader", READERS)
@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("seed: 1\nmodel: x\nseed: 2\n", "line 3: 'seed' is given twice"),
        ("seed: 1\n'seed': 1\n", "line 2: 'seed' is given twice"),
        ("weights: {a: 1, b: 2, a: 3}\n", "line 1: 'a' is given twice"),
        ("seed: 050\n", "line 1: '050' can be read in two ways"),
        ("seed: -007\n", "'-007' can be read in two ways"),
        ("seed: 1:30\n", "'1:30' can be read in two ways"),
        ("ratio: 1:30.5\n", "is not a finite number"),
        ("ratio: .nan\n", "'.nan' is not a finite number"),
        ("ratio: -.inf\n", "'-.inf' is not a finite number"),
        ("ratio: 1.0e+999\n", "is not a finite number"),
        ("model: *a\n", "an alias (*a)"),
        ("model: &a [*a]\n", "an alias (*a)"),
        ("a: !!python/object:os.system 1\n", "could not determine a constructor"),
        ("seed: " + "9" * 5000, ""),
        ("[" * 5000, "is not YAML that can be used"),
        ("model: x" + " " * 2**20, "bytes; settings have"),
    ],
)
def test_values_of_two_meanings(tmp_path: Path, reader: str, text: str, said: str) -> None:
    assert said in refused(READERS[reader], tmp_path / "recipe.yaml", text)


@pytest.mark.parametrize(
    ("text", "value"),
    [("1e-3", 1e-3), ("0", 0), ("1_000", 1000), ("0x1F", 31), ("-5", -5), ("0.5", 0.5),
     ("'050'", "050"), ("yes", True), ("2026-01-01x", "2026-01-01x"), ("é", "é"), ("0.0", 0.0)],
)  # fmt: skip
def test_values_of_one_meaning(tmp_path: Path, text: str, value: Any) -> None:
    (tmp_path / "x.yaml").write_text(f"\ufeffa: {text}\n", encoding="utf-8")
    found = read_yaml(tmp_path / "x.yaml")
    assert found == {"a": value}
    assert type(found["a"]) is type(value)


@pytest.mark.parametrize(
    "text",
    [
        f"model: [{LONG}]", f"seed: {LONG}", f"{LONG}: 1", f"size: {LONG}",
        f"seed: [{'[x], ' * 3000}]", f"weights: {{{LONG}: -1}}", f"weights: {{a: {LONG}}}",
        f"reduce: {LONG}", f"max_memory: {LONG}", f"? [{LONG}]\n: 1",
    ],
)  # fmt: skip
def test_messages_quote_a_line_at_most(tmp_path: Path, text: str) -> None:
    said = refused(READERS["recipe"], tmp_path / "recipe.yaml", text)
    assert len(said) - len(str(tmp_path)) < 250


def test_quotes_are_short() -> None:
    value: Any = "x"
    for _ in range(60):
        value = [value] * 9  # shared: as an alias would be
    started = time.process_time()
    assert len(quote(value)) <= 80
    assert len(quote({"k" * 999: value, 5: {1: value}})) <= 80
    assert time.process_time() - started < 1
    assert quote("a\n" + "b" * 999).startswith("'a\\nbbb")
    assert quote(10**5000) == "a number of 16610 bits"
    assert quote(0.5) == "0.5"
    assert quote("reap") == "'reap'"


def test_what_is_written_is_read(tmp_path: Path) -> None:
    """Lists that are one object in memory are not written as aliases."""
    text = ("a.jsonl", "b.jsonl")
    recipe = Recipe(calibration=text, heldout=text, weights={"no": 1, "050": 2}, ratio=1e-7)
    (tmp_path / "recipe.yaml").write_text(recipe.to_yaml())
    assert load_recipe(tmp_path / "recipe.yaml") == recipe
