"""A plugin of serving/ as a module: it is a distribution of its own, and not installed here."""

from __future__ import annotations

import importlib.util
from typing import Any

from places import ROOT


def plugin_of(engine: str) -> Any:
    """serving/ENGINE/moe_fair_ENGINE.py, imported anew."""
    name = f"moe_fair_{engine}"
    spec = importlib.util.spec_from_file_location(name, ROOT / "serving" / engine / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
