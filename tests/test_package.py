"""What describes the package agrees with it; `.ci/package.sh` builds, installs and uses it."""

from __future__ import annotations

import re

import yaml
from places import ROOT

import moe_fair


def test_one_version() -> None:
    project = (ROOT / "pyproject.toml").read_text()
    cited = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    assert re.search(r'^version = "(.*)"$', project, re.MULTILINE)[1] == moe_fair.__version__  # type: ignore[index]
    assert cited["version"] == moe_fair.__version__
    assert cited["license"] == re.search(r'^license = "(.*)"$', project, re.MULTILINE)[1]  # type: ignore[index]
    assert (
        (ROOT / "CHANGELOG.md").read_text().startswith(f"# Changelog\n\n## {moe_fair.__version__} ")
    )


def test_the_table_of_engines_is_packaged() -> None:
    setup = (ROOT / "setup.py").read_text()
    assert '"moe_fair.serving": ["engines.yaml"]' in setup
    assert (ROOT / "serving" / "engines.yaml").is_file()


def test_every_recipe_folder_is_packaged() -> None:
    """setup.py takes folders of recipes with these kinds of files."""
    for path in (ROOT / "recipes").rglob("*"):
        if path.is_file():
            assert len(path.relative_to(ROOT / "recipes").parts) == 2, path
            assert path.suffix in (".yaml", ".sh"), path
