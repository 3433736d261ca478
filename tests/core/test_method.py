"""The grammar of methods: one text, and the older settings that say the same."""

from __future__ import annotations

from pathlib import Path

import pytest

from moe_fair.core.method import join_method, parse_method
from moe_fair.core.recipe import Recipe, check_taken
from moe_fair.core.recipe_file import load_recipe

SAME = {
    "reap": {"method": "reap"},
    "reap/global": {"method": "reap", "allocate": "global"},
    "reap+refit": {"method": "reap", "repair": "refit"},
    "taylor-sq:reap/tod": {"method": "taylor-sq", "protection": "reap", "allocate": "tod"},
    "fair:ean/tod+none": {
        "method": "fair", "protection": "ean", "allocate": "tod", "repair": "none",
    },
}  # fmt: skip


@pytest.mark.parametrize("text", SAME)
def test_a_text_and_its_parts(text: str) -> None:
    assert parse_method(text) == SAME[text]
    assert join_method(SAME[text]) == text
    assert Recipe(method=text).parts == Recipe(**SAME[text]).parts


@pytest.mark.parametrize(
    "text",
    ["", "/global", "reap/", "reap:", "reap+", "reap+refit/global", "a/b/c", "a:b:c", "a/b:c"],
)
def test_other_forms(text: str) -> None:
    with pytest.raises(ValueError, match=r"write REMOVAL\[:PROTECTION\]\[/ALLOCATOR\]"):
        Recipe(method=text)


@pytest.mark.parametrize(
    ("method", "older"),
    [
        ("reap/global", {"allocate": "uniform"}),
        ("reap:ean/tod", {"protection": "taylor"}),
        ("reap+refit", {"repair": "none"}),
        ("reap/global", {"removal": "ean"}),
    ],
)
def test_contradictions(method: str, older: dict[str, str]) -> None:
    ((name, value),) = older.items()
    with pytest.raises(ValueError) as found:
        Recipe(method=method, **older)
    assert str(found.value) == (
        f"--method {method!r} and --{name} {value!r} contradict one another; leave one out"
    )


def test_saying_it_twice_is_no_contradiction() -> None:
    assert Recipe(method="reap/global", allocate="global").parts["allocate"] == "global"
    # the older form has always replaced a method's own scores
    assert Recipe(method="fair", removal="ean").parts["removal"] == "ean"


def test_what_comes_later_wins_in_either_form() -> None:
    older, newer = Recipe(method="fair", allocate="uniform", repair="none"), Recipe(method="a/b+c")
    assert older.with_settings({"method": "reap/global+refit"}).parts == {
        "method": "reap", "removal": None, "protection": None, "allocate": "global",
        "repair": "refit",
    }  # fmt: skip
    # a method without an allocator has never replaced the one of a file
    assert older.with_settings({"method": "reap"}).parts["allocate"] == "uniform"
    changed = newer.with_settings({"repair": "none"})
    assert (changed.method, changed.repair) == ("a/b", "none")
    assert newer.with_settings({"allocate": "x"}).parts["allocate"] == "x"
    assert newer.with_settings({"method": "reap"}).parts["allocate"] is None


def test_a_repair_is_no_part_of_a_plan(tmp_path: Path) -> None:
    recipe = Recipe(method="reap/global+refit", experts=4)
    assert recipe.planning()["method"] == "reap/global"
    for command in ("plan", "calibrate"):
        with pytest.raises(ValueError, match=rf"{command} does not use the \+refit of --method"):
            check_taken({"method": "reap+refit"}, command)
    check_taken({"method": "reap+refit"}, "prune")
    file = tmp_path / "recipe.yaml"
    file.write_text(recipe.to_yaml())
    assert load_recipe(file) == recipe
