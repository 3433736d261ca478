"""Imports go one way, and what is heavy loads late."""

from __future__ import annotations

import ast
import shutil
import subprocess
import sys
from collections.abc import Collection, Iterator
from pathlib import Path

import pytest
from places import MODEL

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


# what takes seconds to import, and the commands that do without it
HEAVY = ("transformers", "datasets", "lm_eval", "accelerate")
RUNS = """
import sys
from moe_fair.cli import main
for arguments in {commands!r}:
    try:
        main(arguments)
    except SystemExit as stop:
        print(arguments, stop.code, file=sys.stderr)
print(sorted(set({heavy!r}) & set(sys.modules)))
"""


def test_commands_that_need_no_transformers(statistics_folder: Path, tmp_path: Path) -> None:
    """They plan, report, list and refuse."""
    out = tmp_path / "out"
    (out / "moe_fair").mkdir(parents=True)
    shutil.copy(MODEL / "config.json", out)
    plan = ["plan", statistics_folder, "--experts", "40"]
    commands = [
        (["--help"], 0),
        (["prune", "--help"], 0),
        (["settings"], 0),
        (["settings", "method"], 0),
        ([*plan, "-o", out / "moe_fair" / "plan.json"], 0),
        ([*plan, "--reduce", "merge"], 0),
        (["report", out], 0),
        (["check", MODEL], 0),
        (["verify", tmp_path], 2),
        (["push", tmp_path, "a/b"], 2),
        (["prune", tmp_path, "--experts", "4", "-o", tmp_path / "x"], 2),
        (["prune", MODEL, "--experts", "4", "--method", "raep", "-o", tmp_path / "x"], 2),
        (["calibrate", MODEL, "--samples", "0", "-o", tmp_path / "x"], 2),
        (["eval", MODEL], 2),
    ]
    asked = [[str(a) for a in arguments] for arguments, _ in commands]
    code = RUNS.format(commands=asked, heavy=HEAVY)
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    lines = [x for x in done.stderr.splitlines() if x.startswith("[")]
    assert lines == [f"{a} {code}" for a, (_, code) in zip(asked, commands, strict=True)]
    assert done.stdout.splitlines()[-1] == "[]"
    assert (out / "moe_fair" / "report.html").is_file()
