"""Recipes as YAML files."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from moe_fair.core.recipe import MADE, TRUST, Recipe, check_keys, flag, renamed


def load_recipe(path: Path) -> Recipe:
    """Read a YAML recipe; paths of statistics and plan in it are relative to it.

    Raises:
        ValueError: no such file, not YAML, an unknown key (names the nearest), a bad value, or
            one of TRUST.
    """
    raw = renamed(read_settings(path))
    try:
        check_keys(raw, str(path))
        check_trust(raw)
        for name in MADE:
            if isinstance(raw.get(name), str):
                raw[name] = str(path.parent / raw[name])
        return Recipe(**raw, given=frozenset(raw))
    except ValueError as e:
        raise ValueError(f"{path}: {e}") from e


def check_trust(raw: Mapping[Any, Any]) -> None:
    """A file does not allow what only whoever runs it may allow; it may come with the model.

    Raises:
        ValueError: it tries to.
    """
    for name in TRUST:
        if raw.get(name):
            raise ValueError(
                f"{name} is not taken from a file; read the model's files, then allow it with "
                f"{flag(name)} on the command line"
            )


def read_settings(path: Path) -> dict[Any, Any]:
    """The keys and values of a YAML file.

    Raises:
        ValueError: no such file, or no YAML of that kind.
    """
    if not path.is_file():
        raise ValueError(f"no recipe at {path}")
    from moe_fair.core.yaml_file import read_yaml

    raw = read_yaml(path)
    if not isinstance(raw, dict):
        raise ValueError(f"{path} holds no settings; a recipe is `key: value` lines")
    return raw
