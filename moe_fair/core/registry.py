"""Extensions by file: a rule is a module of a folder, or an entry point of another package."""

from __future__ import annotations

import ast
import importlib
import importlib.util
import pkgutil
from collections.abc import Collection, Iterable, Mapping
from difflib import get_close_matches
from importlib.metadata import entry_points
from pathlib import Path
from typing import Any, TypeVar

from moe_fair.core.quote import MOST, quote

T = TypeVar("T")


def discover(package: str, path: Iterable[str], group: str) -> list[Any]:
    """The modules of a package, by name, then what other packages registered under `group`."""
    names = sorted(m.name for m in pkgutil.iter_modules(path))
    own = [importlib.import_module(f"{package}.{n}") for n in names]
    return own + [e.load() for e in sorted(entry_points(group=group), key=lambda e: e.name)]


def declared(package: str, group: str, made: str | None = None) -> list[str] | None:
    """The names of a folder's rules as its files write them, none of which is imported.

    Most rules import torch, which takes longer than to say that there is none of such a name.

    Args:
        group: of entry points.
        made: the class of the rules, whose first argument is the name; else a file is one rule, and
            assigns `name`.

    Returns:
        None where only importing them tells: another package has rules, or a name is not written
        out.
    """
    spec = importlib.util.find_spec(package)
    if spec is None or entry_points(group=group):
        return None
    found: list[str] = []
    modules = pkgutil.iter_modules(spec.submodule_search_locations)
    for module in sorted(modules, key=lambda m: m.name):
        file = Path(module.module_finder.path, f"{module.name}.py")  # type: ignore[union-attr]
        if not file.is_file():  # a package, or byte code alone
            return None
        names = _called(file, made) if made else _assigned(file)
        if None in names:
            return None
        found += filter(None, names)
    return found


def _called(file: Path, made: str) -> list[str | None]:
    """The name in each `made("NAME", ...)`, None for one that is not written out."""
    nodes = ast.walk(ast.parse(file.read_bytes()))
    calls = [n for n in nodes if isinstance(n, ast.Call) and getattr(n.func, "id", None) == made]
    return [_text(n.args[0]) if n.args else None for n in calls] or [None]


def _assigned(file: Path) -> list[str | None]:
    """What `name = "NAME"` says, None where `name` comes otherwise, nothing where it does not."""
    tree = ast.parse(file.read_bytes())
    values = [n.value for n in tree.body if isinstance(n, ast.Assign) and _is_name(n.targets[0])]
    if not values and any(_is_name(n) for n in ast.walk(tree)):
        return [None]
    return [_text(v) for v in values]


def _text(node: ast.AST) -> str | None:
    """What stands in quotes, if this is all."""
    return node.value if isinstance(node, ast.Constant) and isinstance(node.value, str) else None


def _is_name(node: ast.AST) -> bool:
    return isinstance(node, ast.Name) and node.id == "name"


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
