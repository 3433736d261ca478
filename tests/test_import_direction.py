"""Imports go one way, and what is heavy loads late."""

from __future__ import annotations

import ast
import json
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


# what takes a second or more to import, and the commands that do without it
HEAVY = (
    "torch", "transformers", "datasets", "lm_eval", "accelerate", "scipy", "matplotlib", "sklearn",
    "pandas", "pyarrow", "huggingface_hub", "torch_pruning",
)  # fmt: skip
RUNS = """
import json, sys
from moe_fair.cli import main
for arguments in {commands!r}:
    try:
        main(arguments)
    except SystemExit as stop:
        code = stop.code
    print("loaded", json.dumps([code, sorted(set({heavy!r}) & set(sys.modules))]), file=sys.stderr)
"""


def loaded(commands: list[tuple[list[object], int]]) -> list[set[str]]:
    """Which of HEAVY are there after each command, of several in one process, one after another.

    Args:
        commands: their arguments, and the exit code that each should have.
    """
    asked = [[str(a) for a in arguments] for arguments, _ in commands]
    code = RUNS.format(commands=asked, heavy=HEAVY)
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    lines = [x.removeprefix("loaded ") for x in done.stderr.splitlines() if x[:7] == "loaded "]
    found = [json.loads(x) for x in lines]
    got = [(a, code) for a, (code, _) in zip(asked, found, strict=True)]
    assert got == [(a, code) for a, (_, code) in zip(asked, commands, strict=True)], done.stderr
    return [set(names) for _, names in found]


def test_commands_that_need_nothing_heavy(statistics_folder: Path, tmp_path: Path) -> None:
    """They list, look into a config, and refuse."""
    none, new, full = tmp_path / "none", tmp_path / "new", tmp_path / "full"
    full.mkdir()
    (full / "file").touch()
    (full / "moe_fair").mkdir()
    (full / "moe_fair" / "plan.json").touch()
    prune = ["prune", MODEL, "--experts", "40", "-o", new]
    commands: list[tuple[list[object], int]] = [
        (["--help"], 0),
        (["prune", "--help"], 0),
        (["settings"], 0),
        (["settings", "batch_size"], 0),
        (["settings", "of-nothing"], 2),
        ([*prune, "--method", "reep"], 2),
        ([*prune, "--method", "reap:tailor/tod+refit"], 2),
        ([*prune, "--method", "reap/globl"], 2),
        ([*prune, "--method", "reap+refitt"], 2),
        (["recipes"], 0),
        (["check", MODEL], 0),
        (["check", none], 2),
        (["report", none], 2),
        (["verify", none], 2),
        (["verify", full, "--against", none], 2),
        (["push", none, "a/b"], 2),
        (["plan", none, "--experts", "40"], 2),
        (["plan", statistics_folder, "--experts", "x"], 2),
        (["oracle", none, "-o", new], 2),
        (["eval", MODEL], 2),
        (["eval", none, "--tasks", "x"], 2),
        (["eval", MODEL, "--agreement", "--baseline", none], 2),
        (["sample", none, "-o", new], 2),
        (["calibrate", MODEL, "--samples", "0", "-o", new], 2),
        (["calibrate", MODEL, "-c", none, "-o", new], 2),
        (["calibrate", none, "-o", new], 2),
        (["prune", none, "--experts", "4", "-o", new], 2),
        ([*prune, "-c", tmp_path / "none.jsonl"], 2),
        ([*prune, "--heldout", none], 2),
        ([*prune, "--stats", none], 2),
        (["prune", MODEL, "--plan", none, "-o", new], 2),
        ([*prune, "--stats", none, "--plan", none], 2),
        ([*prune, "--recipe", none], 2),
        ([*prune, "--set", "nothing=3"], 2),
        (["prune", MODEL, "--ratio", "3", "-o", new], 2),
        (["vision", "prune", "x", "--data", "digits", "--ratio", "3", "-o", new], 2),
        (["vision", "sparsify", "x", "--data", "digits", "--sparsity", "3", "-o", new], 2),
    ]
    for (arguments, _), names in zip(commands, loaded(commands), strict=True):
        assert not names, arguments


@pytest.mark.slow
def test_commands_that_need_no_transformers(statistics_folder: Path, tmp_path: Path) -> None:
    """Plans, reports and names of methods take torch and numpy; drawing takes matplotlib."""
    out = tmp_path / "out"
    (out / "moe_fair").mkdir(parents=True)
    shutil.copy(MODEL / "config.json", out)
    (out / "theirs.py").touch()
    plan = ["plan", statistics_folder, "--experts", "40"]
    commands: list[tuple[list[object], int]] = [
        ([*plan, "-o", out / "moe_fair" / "plan.json"], 0),
        ([*plan, "--experts", "400"], 2),
        ([*plan, "--method", "raep"], 2),
        (["settings", "method"], 0),
        (["prune", MODEL, "--experts", "4", "--method", "raep", "-o", tmp_path / "x"], 2),
        (["verify", out], 1),  # code that is not ours
        ([*plan, "--reduce", "merge"], 0),
        (["report", out], 0),
    ]
    *others, merged, drawn = loaded(commands)
    for (arguments, _), names in zip(commands, others, strict=False):
        assert names == {"torch"}, arguments
    assert merged == {"torch", "scipy"}  # its clustering
    assert drawn == {"torch", "scipy", "matplotlib"}
    assert (out / "moe_fair" / "report.html").is_file()
