"""Extensions by file: a rule is a module of a folder, or an entry point of another package."""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Collection, Iterable, Mapping
from difflib import get_close_matches
from importlib.metadata import entry_points
from typing import Any, TypeVar

from moe_fair.core.quote import MOST, quote

T = TypeVar("T")


def discover(package: str, path: Iterable[str], group: str) -> list[Any]:
    """The modules of a package, by name, then what other packages registered under `group`."""
    names = sorted(m.name for m in pkgutil.iter_modules(path))
    own = [importlib.import_module(f"{package}.{n}") for n in names]
    return own + [e.load() for e in sorted(entry_points(group=group), key=lambda e: e.name)]


def pick(table: Mapping[str, T], name: str, what: str) -> T:
    """`table[name]`.

    Raises:
        ValueError: no such entry; names the nearest and lists all.
    """
    if name in table:
        return table[name]
    raise ValueError(f"no {what} {quote(name)}{nearest(name, table)}; there are {', '.join(table)}")


def check_settings(given: Iterable[Any], known: Collection[str], where: str = "") -> None:
    """Every given name is a known setting.

    Raises:
        ValueError: one is not; names the nearest, and `where` it was found.
    """
    for name in given:
        if name not in known:
            raise ValueError(f"no setting {quote(name)}{nearest(str(name), known)}{where}")


def nearest(name: str, names: Iterable[str]) -> str:
    """`, did you mean 'x'?` for the closest of the names, or nothing."""
    close = get_close_matches(name[:MOST], list(names), n=1, cutoff=0.5)
    return f" (did you mean {close[0]!r}?)" if close else ""
