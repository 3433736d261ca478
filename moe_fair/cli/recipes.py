"""`moe-fair recipes`: what the package has settings for."""

from __future__ import annotations

import json

from moe_fair.cli.options import Debug, Json
from moe_fair.core.bundled_recipes import bundled_recipes, recipes_folder
from moe_fair.core.printable import printable


def recipes(as_json: Json = False, debug: Debug = False) -> None:
    """List the recipes that come along; --recipe takes their names."""
    found = bundled_recipes()
    if as_json:
        print(json.dumps([{**vars(r), "path": str(r.path)} for r in found], indent=1))
        return
    widths = max(len(r.kind) for r in found), max(len(r.name) for r in found)
    for r in found:
        print(f"{r.kind:<{widths[0]}}  {r.name:<{widths[1]}}  {printable(r.header)}")
    print(f"files: {printable(recipes_folder())}")
