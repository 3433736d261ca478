"""What pyproject.toml cannot say: `recipes/` goes into the wheel, as `moe_fair/recipes`."""

from pathlib import Path

from setuptools import find_packages, setup

RECIPES = [f"moe_fair.recipes.{p.name}" for p in sorted(Path("recipes").iterdir()) if p.is_dir()]

setup(
    packages=[*find_packages(include=["moe_fair*"]), "moe_fair.recipes", *RECIPES],
    package_dir={"moe_fair.recipes": "recipes"},
    package_data={"moe_fair": ["py.typed"]} | {name: ["*.yaml", "*.sh"] for name in RECIPES},
)
