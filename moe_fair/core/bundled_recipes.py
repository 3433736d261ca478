"""The recipes that come with the package, found by name.

In a checkout and an editable install they are the folder `recipes/` beside the package, in a wheel
`moe_fair/recipes/`. A folder is a kind: `moe` for models, `rivals` for published methods, `vision`
for image classifiers, `calibration` for calibration text (what `-c` takes the names of, no
settings). `cluster/` holds files for launchers, no recipes.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from moe_fair.core.quote import quote
from moe_fair.core.registry import nearest

EXPERTS = ("moe", "rivals")
VISION = ("vision",)
CALIBRATION = ("calibration",)


@dataclass(frozen=True)
class BundledRecipe:
    """A recipe of the package.

    Attributes:
        name: what `--recipe` (or `-c`) takes; one of its kind, two commands may each have theirs.
        kind: its folder.
        header: first comment line.
        path: of the file.
    """

    name: str
    kind: str
    header: str
    path: Path


def recipes_folder() -> Path:
    """Where they lie.

    Raises:
        ValueError: nowhere; the package was not installed as it is built.
    """
    package = Path(__file__).parents[1]
    for folder in (package / "recipes", package.parent / "recipes"):
        if (folder / EXPERTS[0]).is_dir():
            return folder
    raise ValueError(f"no recipes beside {package}; install moe_fair again, or give a path")


def bundled_recipes(
    kinds: Sequence[str] = (*EXPERTS, *VISION, *CALIBRATION),
) -> list[BundledRecipe]:
    """Those of these kinds, by kind and name."""
    folder = recipes_folder()
    return [
        BundledRecipe(path.stem, kind, _header(path), path)
        for kind in kinds
        for path in sorted((folder / kind).glob("*.yaml"))
    ]


def recipe_path(given: Path, kinds: Sequence[str]) -> Path:
    """The file that `--recipe` means: one on disk, or a recipe of the package by its name.

    Raises:
        ValueError: it is neither; names the nearest.
    """
    if given.is_file():
        return given
    names = {r.name: r.path for r in bundled_recipes(kinds)}
    if str(given) in names:
        return names[str(given)]
    raise ValueError(
        f"no recipe at {quote(str(given))}, and none of that name"
        f"{nearest(given.stem if given.suffix == '.yaml' else given.name, names)}; "
        "moe-fair recipes lists them"
    )


def _header(path: Path) -> str:
    first = path.read_text(encoding="utf-8").partition("\n")[0]
    return first.removeprefix("#").strip() if first.startswith("#") else ""
