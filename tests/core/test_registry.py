"""Extensions by file and by entry point; names that are nearly right."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest

from moe_fair.core import allocate, registry
from moe_fair.core.allocate import allocator, allocators, needs
from moe_fair.moe.criteria import criteria
from moe_fair.moe.repairs import repairs
from moe_fair.pipelines.choices import RULES


def test_modules_come_by_name_then_what_others_registered(monkeypatch: pytest.MonkeyPatch) -> None:
    registered = [
        SimpleNamespace(name=n, load=lambda n=n: SimpleNamespace(name=n)) for n in ("z", "b")
    ]
    asked = []

    def entry_points(group: str) -> list[SimpleNamespace]:
        asked.append(group)
        return registered

    monkeypatch.setattr(registry, "entry_points", entry_points)
    found = registry.discover("moe_fair.core.allocate", allocate.__path__, "some.group")
    own = [m.__name__.rpartition(".")[2] for m in found[:-2]]
    assert own == sorted(own)
    assert "tod" in own
    assert [m.name for m in found[-2:]] == ["b", "z"]
    assert asked == ["some.group"]


@pytest.mark.parametrize(("kind", "table"), [
    ("criterion", criteria), ("allocator", allocators), ("repair", repairs),
])  # fmt: skip
def test_names_are_known_without_importing_rules(
    kind: str, table: Callable[[], dict[str, object]]
) -> None:
    assert registry.declared(*RULES[kind]) == list(table())


@pytest.mark.parametrize(
    ("text", "made", "wanted"),
    [
        ('rules = (Rule("a", 1), Rule("b", 2))', "Rule", ["a", "b"]),
        ('rules = tuple(Rule(n, 1) for n in "ab")', "Rule", None),
        ("from elsewhere import rules", "Rule", None),
        ('name = "a"', None, ["a"]),
        ('name = "a" + suffix', None, None),
        ('name: str = "a"', None, None),
        ("def climb(): ...", None, []),
    ],
)
def test_names_that_are_not_written_out_are_asked_of_the_rules(
    text: str, made: str | None, wanted: list[str] | None, tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    folder = tmp_path / "rules_of_a_test"
    folder.mkdir()
    (folder / "__init__.py").touch()
    (folder / "one.py").write_text(text)
    monkeypatch.syspath_prepend(tmp_path)
    assert registry.declared(folder.name, "no.group", made) == wanted
    registered = SimpleNamespace(name="x")
    monkeypatch.setattr(registry, "entry_points", lambda group: [registered])
    assert registry.declared(folder.name, "no.group", made) is None
    monkeypatch.delitem(sys.modules, folder.name, raising=False)
    importlib.invalidate_caches()


def test_a_name_that_is_nearly_right() -> None:
    table = {"uniform": 1, "tod": 2}
    assert registry.pick(table, "tod", "allocator") == 2
    with pytest.raises(ValueError) as found:
        registry.pick(table, "unifrom", "allocator")
    assert str(found.value) == (
        "no allocator 'unifrom' (did you mean 'uniform'?); there are uniform, tod"
    )
    assert registry.nearest("unifrom", table) == " (did you mean 'uniform'?)"
    assert registry.nearest("xyz", table) == ""
    assert registry.nearest("abcd", ["abxx"]) == " (did you mean 'abxx'?)"  # half of it
    assert registry.nearest("abcde", ["abxxx"]) == ""


def test_allocators_are_found_and_say_what_they_need() -> None:
    assert allocator("tod").name == "tod"
    with pytest.raises(ValueError, match="no allocator 'todd' \\(did you mean 'tod'"):
        allocator("todd")
    wanted = {
        "curves": {"costs"}, "fisher": {"rows"}, "global": set(), "global-normalised": set(),
        "naee": {"gram"}, "tod": {"protection"}, "tod-curves": {"costs", "protection"},
        "uniform": set(),
    }  # fmt: skip
    for name, what in wanted.items():
        rule = allocator(name)
        assert {n for n in ("costs", "rows", "gram", "protection") if needs(rule, n)} == what
