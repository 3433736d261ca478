"""Calibration text by name: data sets on the Hub for one use, a file in `recipes/calibration/`.

# first line: what it is for
sets:
  - id: openai/gsm8k
    config: main            # where it has several
    split: train
    revision: e53f0488...   # the commit that is read
    licence: mit            # as its card says
    schema: question/answer # a name in `schemas.SCHEMAS`
    share: 1                # of the samples, relative to the others
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from moe_fair.core.bundled_recipes import CALIBRATION, bundled_recipes
from moe_fair.core.quote import quote
from moe_fair.core.registry import pick
from moe_fair.moe.schemas import SCHEMAS, Schema

NAME = re.compile(r"[a-z]+")
KEYS = {"id": str, "config": str, "split": str, "revision": str, "licence": str, "schema": str,
        "share": (int, float)}  # fmt: skip


@dataclass(frozen=True, slots=True)
class HubSet:
    """A data set of a preset; see above."""

    id: str
    split: str
    revision: str
    licence: str
    schema: Schema
    share: float
    config: str | None = None


def presets() -> dict[str, Path]:
    """Every preset's file by its name."""
    return {r.name: r.path for r in bundled_recipes(CALIBRATION)}


def is_preset(name: str) -> bool:
    """There is one of this name."""
    return NAME.fullmatch(name) is not None and name in presets()


def preset(name: str) -> list[HubSet]:
    """The data sets of a preset.

    Raises:
        ValueError: its file is not one.
    """
    from moe_fair.core.yaml_file import read_yaml

    path = presets()[name]
    raw = read_yaml(path)
    if not isinstance(raw, dict) or set(raw) != {"sets"} or not isinstance(raw["sets"], list):
        raise ValueError(f"{path}: a preset holds `sets`, a list of data sets, and nothing else")
    return [_hub_set(found, path) for found in raw["sets"]]


def _hub_set(found: Any, path: Path) -> HubSet:
    if not isinstance(found, Mapping) or set(found) | {"config"} != set(KEYS):
        raise ValueError(f"{path}: {quote(found)} must have {', '.join(KEYS)}, perhaps no config")
    for key, value in found.items():
        if not isinstance(value, KEYS[key]) or isinstance(value, bool):  # type: ignore[arg-type]
            raise ValueError(f"{path}: {key} is {quote(value)}")
    if not found["share"] > 0:
        raise ValueError(f"{path}: share is {found['share']} and must be above 0")
    schema = pick({s.name: s for s in SCHEMAS}, found["schema"], f"schema in {path}:")
    return HubSet(**{**found, "schema": schema})
