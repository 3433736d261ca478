"""`moe-fair settings`: every setting of a run in a list, or one in full."""

from __future__ import annotations

import json
import shutil
import sys
import textwrap
from dataclasses import MISSING
from typing import Any

from moe_fair.core.quote import clip
from moe_fair.core.recipe import TRUST, Recipe
from moe_fair.core.registry import check_settings
from moe_fair.core.settings import Setting, flag, key_of, name_of, settings_of
from moe_fair.vision.settings import Settings
from moe_fair.vision.sparse.settings import SparseSettings

TYPES = {str: "text", int: "whole number", float: "number", bool: "true or false"}


def show(name: str | None, as_json: bool) -> None:
    """Print one setting, or all; as JSON a list of objects.

    Raises:
        ValueError: there is none of that name; says the nearest.
    """
    chosen = every()
    if name is not None:
        name = name_of(name.replace("-", "_"))
        check_settings([name], [its.name for its in chosen])
        chosen = [its for its in chosen if its.name == name]
    if as_json:
        facts = [_facts(its, full=name is not None) for its in chosen]
        print(json.dumps(facts, indent=1, ensure_ascii=False))
    elif name is None:
        _list(chosen)
    else:
        for its in chosen:
            _one(its)


def every() -> list[Setting]:
    """All settings; where commands have their own of one name, each."""
    found: list[Setting] = []
    for kind in (Recipe, Settings, SparseSettings):
        found += [its for its in settings_of(kind).values() if its not in found]
    return found


def _list(settings: list[Setting]) -> None:
    """One line each: name, default, commands, what it is."""
    rows = [(key_of(s.name), clip(s.usual, 24), ", ".join(s.about.commands)) for s in settings]
    widths = [max(len(row[i]) for row in rows) for i in range(3)]
    room = shutil.get_terminal_size((160, 24)).columns if sys.stdout.isatty() else 10**6
    for its, row in zip(settings, rows, strict=True):
        start = "  ".join(text.ljust(n) for text, n in zip(row, widths, strict=True)) + "  "
        print(start + clip(its.about.help, max(room - len(start), 24)))


def _one(its: Setting) -> None:
    """Everything that is known of it."""
    facts = _facts(its, full=True)
    print(
        f"{key_of(its.name)}: {facts['type']}" + (f"  [default: {its.usual}]" if its.usual else "")
    )
    print(textwrap.indent(textwrap.fill(its.about.help, 96), "  "))
    print(f"  commands: {', '.join(its.about.commands)}")
    given = facts["option"] or f"--set {key_of(its.name)}=..."
    file = "; never in a recipe" if its.name in TRUST else f", or {key_of(its.name)}: in a recipe"
    print(f"  given by: {given}{file}")
    if its.about.minimum is not None:
        print(f"  least: {its.about.minimum}")
    if facts["choices"]:
        width = max(map(len, facts["choices"]))
        print("  choices:")
        for value, line in facts["choices"].items():
            print(f"    {value.ljust(width)}  {line}".rstrip())


def _facts(its: Setting, full: bool) -> dict[str, Any]:
    """For scripts; `full` with the choices, for which every rule is imported."""
    about = its.about
    words = about.flags or (flag(its.name),)
    facts: dict[str, Any] = {
        "name": key_of(its.name), "default": None if its.default is MISSING else its.default,
        "usual": its.usual, "help": about.help,
        "type": TYPES.get(its.kind) or ("texts" if "tuple" in str(its.kind) else "names: numbers"),
        "commands": list(about.commands),
        "shown": [c for c in about.commands if its.shown_by(c)],
        "option": " ".join(words) if about.option else None, "minimum": about.minimum,
    }  # fmt: skip
    if full:
        from moe_fair.pipelines.choices import choices

        facts["choices"] = choices(about)
    return facts
