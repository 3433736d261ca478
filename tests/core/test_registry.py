"""Extensions by file and by entry point; names that are nearly right."""

from __future__ import annotations

from types import SimpleNamespace

import pytest

from moe_fair.core import allocate, registry
from moe_fair.core.allocate import allocator, needs


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
