"""What pyproject.toml cannot say: `recipes/` and the table of engines go into the wheel."""

from pathlib import Path

from setuptools import find_packages, setup

RECIPES = [f"moe_fair.recipes.{p.name}" for p in sorted(Path("recipes").iterdir()) if p.is_dir()]

setup(
    packages=[
        *find_packages(include=["moe_fair*"]),
        "moe_fair.recipes",
        *RECIPES,
        "moe_fair.serving",
    ],
    package_dir={"moe_fair.recipes": "recipes", "moe_fair.serving": "serving"},
    package_data={"moe_fair": ["py.typed"], "moe_fair.serving": ["engines.yaml"]}
    | {name: ["*.yaml", "*.sh"] for name in RECIPES},
)
