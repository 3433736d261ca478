"""Recipes by name: what `--recipe` finds, what `moe-fair recipes` lists, headers to read."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from places import ROOT

from moe_fair.cli import main
from moe_fair.core import bundled_recipes as bundled
from moe_fair.core.bundled_recipes import CALIBRATION, EXPERTS, VISION, recipe_path

KINDS = (*EXPERTS, *VISION, *CALIBRATION)
FILES = [p for kind in KINDS for p in sorted((ROOT / "recipes" / kind).glob("*"))]


def listed(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    with pytest.raises(SystemExit) as stop:
        main(["recipes", *arguments])
    assert not stop.value.code
    return capsys.readouterr().out


def test_every_file_is_listed_with_its_header(capsys: pytest.CaptureFixture[str]) -> None:
    lines = listed(capsys).splitlines()
    assert lines[-1] == f"files: {ROOT / 'recipes'}"
    assert len(lines) == len(FILES) + 1
    for line, path in zip(lines[:-1], FILES, strict=True):
        kind, name, header = line.split(maxsplit=2)
        assert (kind, name) == (path.parent.name, path.stem)
        assert path.read_text().startswith(f"# {header}\n")


def test_the_list_for_scripts(capsys: pytest.CaptureFixture[str]) -> None:
    found = json.loads(listed(capsys, "--json"))
    assert [Path(r["path"]) for r in found] == FILES
    assert {tuple(r) for r in found} == {("name", "kind", "header", "path")}


@pytest.mark.parametrize("path", FILES, ids=lambda p: f"{p.parent.name}-{p.stem}")
def test_headers_stand_alone(path: Path) -> None:
    """The line that is listed is a sentence; the command below it names the recipe."""
    head = [x for x in path.read_text().splitlines() if x.startswith("#")]
    assert head[0].endswith(".")
    option = "-c" if path.parent.name in CALIBRATION else "--recipe"
    [command] = [x for x in head if "moe-fair" in x and option in x.split()]
    assert f"{option} {path.stem} " in command


def test_a_path_a_name_and_neither(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    reap = ROOT / "recipes" / "rivals" / "reap.yaml"
    monkeypatch.chdir(tmp_path)
    assert recipe_path(Path("reap"), EXPERTS) == reap
    assert recipe_path(reap, VISION) == reap  # a file is what it is
    Path("reap").mkdir()  # an output of that name is no recipe
    assert recipe_path(Path("reap"), EXPERTS) == reap
    shutil.rmtree("reap")
    shutil.copy(ROOT / "recipes" / "rivals" / "ean.yaml", "reap")
    assert recipe_path(Path("reap"), EXPERTS) == Path("reap")
    for given in ("reep", "recipes/rivals/reep.yaml"):
        with pytest.raises(ValueError, match=r"no recipe at '.*reep.*\(did you mean 'reap'\?\)"):
            recipe_path(Path(given), EXPERTS)


def test_each_command_finds_its_own_kind() -> None:
    for kinds, folder in ((EXPERTS, "rivals"), (VISION, "vision")):
        assert recipe_path(Path("taylor"), kinds).parent.name == folder


@pytest.mark.parametrize("kinds", [EXPERTS, VISION])
def test_names_are_told_apart(kinds: tuple[str, ...]) -> None:
    names = [r.name for r in bundled.bundled_recipes(kinds)]
    assert len(names) == len(set(names)) > 0


def test_the_commands_take_names(fails: Callable[..., str], tmp_path: Path) -> None:
    """Each gets as far as what its recipe leaves open."""
    out = tmp_path / "out"
    assert "model" in fails("prune", "--recipe", "reap", "--ratio", ".5", "-o", out).lower()
    line = fails("vision", "prune", "--recipe", "digits", "-o", out)
    assert "digits/resnet20-0.safetensors" in line
    line = fails("vision", "sparsify", "--recipe", "digits-sparse", "-o", out)
    assert "digits/vgg_small-0.safetensors" in line
    assert "'digits'" in fails("vision", "prune", "--recipe", "digts", "-o", out)


def test_a_package_without_recipes_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bundled, "__file__", str(tmp_path / "moe_fair" / "core" / "x.py"))
    with pytest.raises(ValueError, match=r"no recipes beside .*install moe_fair again"):
        recipe_path(Path("reap"), EXPERTS)
