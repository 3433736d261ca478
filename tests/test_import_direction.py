"""Imports go one way, and what is heavy loads late."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Collection, Iterator
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parent.parent / "moe_fair"
# a folder may import those before it, and itself; the two in one row never each other
ORDER = [
    {"version"},
    {"core"},
    {"engines"},
    {"moe", "vision"},
    {"evaluate"},
    {"report"},
    {"pipelines"},
    {"publish"},
    {"cli"},
    {"__main__", "__init__"},
]
OUTSIDE_CORE = {"torch", "numpy", "safetensors", "psutil", "yaml"}


def modules() -> list[Path]:
    return sorted(PACKAGE.rglob("*.py"))


def part(path: Path) -> str:
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def imported(path: Path) -> Iterator[str]:
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (a.name for a in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            assert node.level == 0, f"{path}: relative import"
            yield node.module


def rank(name: str) -> int:
    ranks = [i for i, row in enumerate(ORDER) if name in row]
    assert ranks, f"moe_fair/{name} has no place in the order of imports"
    return ranks[0]


@pytest.mark.parametrize("path", modules(), ids=lambda p: str(p.relative_to(PACKAGE)))
def test_imports_go_one_way(path: Path) -> None:
    own = part(path)
    for name in imported(path):
        words = name.split(".")
        if words[0] != "moe_fair" or words == ["moe_fair"]:
            continue
        assert words[1] == own or rank(words[1]) < rank(own), f"{own} imports {name}"


def test_no_module_imports_itself_by_way_of_others() -> None:
    names = {".".join(p.relative_to(PACKAGE.parent).with_suffix("").parts): p for p in modules()}
    names = {n.removesuffix(".__init__"): p for n, p in names.items()}
    arrows = {n: _targets(p, names.keys()) - {n} for n, p in names.items()}
    # what imports nothing that is left goes, until nothing goes any more
    while ends := {n for n, to in arrows.items() if not to & arrows.keys()}:
        arrows = {n: to for n, to in arrows.items() if n not in ends}
    assert not arrows, f"in circles, or above one: {sorted(arrows)}"


def _targets(path: Path, known: Collection[str]) -> set[str]:
    """Those that a file imports, as modules or for names in them; lazy imports too."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.module:
            inside = {f"{node.module}.{a.name}" for a in node.names}
            found |= {n if n in known else node.module for n in inside}
        elif isinstance(node, ast.Import):
            found |= {a.name for a in node.names}
    return found & set(known)


@pytest.mark.parametrize("path", sorted((PACKAGE / "core").rglob("*.py")), ids=lambda p: p.name)
def test_core_knows_little(path: Path) -> None:
    outside = {n.split(".")[0] for n in imported(path)} - set(sys.stdlib_module_names)
    assert outside <= OUTSIDE_CORE | {"moe_fair"}


@pytest.mark.parametrize("code", ["import moe_fair", "from moe_fair.cli import app"])
def test_heavy_packages_load_late(code: str) -> None:
    check = f"{code}; import sys; print(sorted({{'torch', 'transformers'}} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", check], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
