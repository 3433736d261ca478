"""The one grammar of methods: REMOVAL[:PROTECTION][/ALLOCATOR][+REPAIR]."""

from __future__ import annotations

import re
from collections.abc import Mapping

from moe_fair.core.quote import quote

GRAMMAR = "REMOVAL[:PROTECTION][/ALLOCATOR][+REPAIR]"
# setting -> the sign before it
SIGNS = {"protection": ":", "allocate": "/", "repair": "+"}
_FORM = re.compile(
    r"(?P<method>[^:/+]+)(:(?P<protection>[^:/+]+))?(/(?P<allocate>[^:/+]+))?(\+(?P<repair>[^:/+]+))?"
)


def parse_method(text: str, option: str = "--method") -> dict[str, str]:
    """The parts of a method that are there, by the settings that they stand for.

    Args:
        text: as `reap`, `reap/global+refit` or `taylor-sq:reap/tod`.
        option: where it was given, for the error.

    Raises:
        ValueError: it has another form.
    """
    found = _FORM.fullmatch(text)
    if found is None:
        raise ValueError(f"{option} {quote(text)}: write {GRAMMAR}, as reap/global+refit")
    return {name: part for name, part in found.groupdict().items() if part is not None}


def join_method(parts: Mapping[str, str]) -> str:
    """The text of which `parse_method` makes these parts."""
    return parts["method"] + "".join(s + parts[n] for n, s in SIGNS.items() if n in parts)
