"""What a result is called where nobody named it."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from places import CALIBRATION, MODEL

import moe_fair
from moe_fair.cli import main
from moe_fair.core.recipe import Recipe
from moe_fair.pipelines.default_output import model_name, pruned_output, statistics_output

HUB = "Qwen/Qwen1.5-MoE-A2.7B-Chat"


@pytest.mark.parametrize(
    ("target", "name"),
    [
        ({"experts": 40}, "40-experts"),
        ({"experts": 40.5}, "40.5-experts"),
        ({"total": 960}, "total-960"),
        ({"ratio": 0.25}, "ratio-0.25"),
        ({"size": "20GB"}, "size-20GB"),
        ({"size": " 20 GB"}, "size-20GB"),
        ({"tolerance": 0.1}, "tolerance-0.1"),
    ],
)
def test_names_of_targets(target: dict[str, Any], name: str) -> None:
    found = pruned_output(Recipe(model=HUB, **target))
    assert found == Path(f"Qwen1.5-MoE-A2.7B-Chat-{name}")


def test_a_plan_names_its_own_target(statistics_folder: Path) -> None:
    recipe = Recipe(model=HUB)
    for target, name in (
        ({"experts": 40}, "40-experts"), ({"total": 240}, "total-240"),
        ({"ratio": 0.25}, "ratio-0.25"), ({"size": "7M"}, "size-7000000-parameters"),
        ({"size": "14MB"}, "size-14000000-bytes"), ({"tolerance": 0.1}, "tolerance-0.1"),
    ):  # fmt: skip
        plan = moe_fair.plan(statistics_folder, **target)
        assert pruned_output(recipe, plan.target).name == f"Qwen1.5-MoE-A2.7B-Chat-{name}"


@pytest.mark.parametrize(
    ("model", "name"),
    [
        (HUB, "Qwen1.5-MoE-A2.7B-Chat"),
        ("eval/tiny-qwen2-moe/", "tiny-qwen2-moe"),
        ("/models/a b(c):d/", "a-b-c-d"),
        ("..hidden", "hidden"),
        ("--option", "option"),
        ("Модель", "Модель"),
        ("???", "model"),
        ("/", "model"),
        ("x" * 300, "x" * 80),
    ],
)
def test_names_of_models(model: str, name: str) -> None:
    assert model_name(Recipe(model=model)) == name
    assert statistics_output(Recipe(model=model)) == Path(f"{name}-statistics")


def test_the_directory_that_we_are_in(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "mine" / "sub").mkdir(parents=True)
    monkeypatch.chdir(tmp_path / "mine" / "sub")
    assert model_name(Recipe(model=".")) == "sub"
    assert model_name(Recipe(model="..")) == "mine"


@pytest.mark.slow
def test_it_is_said_and_an_existing_one_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fails: Callable[..., str],
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    shutil.copytree(MODEL, tmp_path / "model")
    monkeypatch.chdir(tmp_path)
    text = ["-c", str(CALIBRATION), "--samples", "4", "--length", "32"]
    with pytest.raises(SystemExit, match="0"):
        main(["calibrate", "model/", *text])
    assert "output: model-statistics\n" in capsys.readouterr().err
    assert "model-statistics is not empty" in fails("calibrate", "model/", *text)
    prune = [
        "prune",
        "./model",
        "--stats",
        "model-statistics",
        "--ratio",
        ".25",
        "--repair",
        "none",
    ]
    with pytest.raises(SystemExit, match="0"):
        main(prune)
    assert "output: model-ratio-0.25\n" in capsys.readouterr().err
    assert (tmp_path / "model-ratio-0.25" / "moe_fair" / "plan.json").is_file()
    assert "model-ratio-0.25 is not empty" in fails(*prune)
    assert "no model given" in fails("prune", "--experts", 40)
    assert "no model given" in fails("calibrate")
    assert "give exactly one target" in fails("prune", "./model")
