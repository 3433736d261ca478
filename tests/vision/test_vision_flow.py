"""`moe-fair vision prune` from its arguments to a folder that loads, killed on the way or not."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from places import ROOT
from safetensors.torch import save_file
from vision.architectures import images, lively, small

from moe_fair.cli import main
from moe_fair.core.plan import Plan
from moe_fair.core.units import Statistics
from moe_fair.pipelines import vision as pipeline
from moe_fair.vision import load_pruned, step_folder
from moe_fair.vision.accuracy import top1
from moe_fair.vision.checkpoint import open_pruned
from moe_fair.vision.data import open_data
from moe_fair.vision.graph import logits
from moe_fair.vision.inputs import matched
from moe_fair.vision.settings import Settings

pytestmark = pytest.mark.slow  # whole runs, by and large

NET = "vision.architectures:small"
QUICK = ["--samples", "18", "--directions", "8", "--batch-size", "12", "--image-size", "16"]


@pytest.fixture(autouse=True)
def _no_clock(monkeypatch: pytest.MonkeyPatch) -> None:
    """Six forwards for each latency."""
    stock = pipeline.latency
    monkeypatch.setattr(pipeline, "latency", lambda models, x: stock(models, x, seconds=0))


def run(*arguments: object) -> None:
    with pytest.raises(SystemExit) as stop:
        main(["vision", "prune", *map(str, arguments)])
    assert not stop.value.code


def settings(pictures: Path, **more: Any) -> Settings:
    return Settings.of(
        {
            "model": NET, "data": str(pictures), "ratio": 0.5, "samples": 18, "directions": 8,
            "batch_size": 12, "image_size": 16, "device": "cpu", **more,
        }
    )  # fmt: skip


def same(a: torch.nn.Module, b: torch.nn.Module) -> bool:
    return all(
        torch.equal(x, y)
        for x, y in zip(a.state_dict().values(), b.state_dict().values(), strict=True)
    )


def test_the_command(pictures: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "out"
    run(NET, "--data", pictures, "--ratio", "0.5", *QUICK, "--finetune-epochs", "1", "-o", out)
    screen = capsys.readouterr().out
    plan = Plan.load(out / "moe_fair" / "plan.json")
    result = json.loads((out / "moe_fair" / "result.json").read_text())
    kept, size = sum(len(g.kept) for g in plan.groups), sum(g.size for g in plan.groups)
    assert kept == round(size * 0.5)
    assert f"{kept} of {size} units kept, tod on u-score against taylor" in screen
    model = load_pruned(out, trust_remote_code=True)
    operations = result["cost"]["pruned"]
    assert sum(p.numel() for p in model.parameters()) == operations["parameters"]
    assert f"{operations['operations']:,}" in screen
    source = open_pruned(out, trust_remote_code=True)
    test = open_data(str(pictures), source.transform).test
    assert top1(model, test, 4) == result["top1"]["final"]
    assert [r["batch"] for r in result["latency_ms"]] == [1]
    page = (out / "moe_fair" / "report.html").read_text()
    assert page.count("data:image/png;base64,") == 3
    assert f"{operations['parameters']:,}" in page
    assert {p.name for p in out.iterdir()} == {"model.safetensors", "pruned.json", "moe_fair"}
    assert [p.name for p in tmp_path.iterdir()] == ["out"]
    Statistics.load(out / "moe_fair")


class Both(torch.nn.Module):
    """Gives its features beside its logits."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.head = torch.nn.Conv2d(3, 8, 3), torch.nn.Linear(8, 3)

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        features = self.first(x).relu().mean((2, 3))
        return features, self.head(features)


def test_a_result_knows_where_its_logits_are(
    pictures: Path, tmp_path: Path, fails: Callable[..., str]
) -> None:
    common = ["--data", pictures, "--ratio", ".5", *QUICK]
    net = "vision.test_vision_flow:Both"
    assert "say which they are, by name or number, with --logits" in fails(
        "vision", "prune", net, *common, "-o", tmp_path / "out"
    )
    run(net, *common, "--logits", 1, "-o", tmp_path / "out")
    run(tmp_path / "out", *common, "--trust-remote-code", "-o", tmp_path / "again")
    model = load_pruned(tmp_path / "again", trust_remote_code=True)
    assert logits(model, torch.rand(4, 3, 16, 16)).shape == (4, 3)
    assert model.first.out_channels == 2  # type: ignore[union-attr]
    assert "--logits belongs to a `module:function` model" in fails(
        "vision", "prune", tmp_path / "out", *common, "--logits", 1, "-o", tmp_path / "third"
    )


def test_json_and_a_second_pruning_of_the_result(
    pictures: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    first, second = tmp_path / "first", tmp_path / "second"
    quick = [*QUICK[:6], "--data", pictures, "--removal", "l1", "--allocate", "uniform", "--json"]
    run(NET, *quick, "--flops", "0.3", "--image-size", "16", "-o", first)
    found = json.loads(capsys.readouterr().out)
    share = [found["cost"][k]["operations"] for k in ("pruned", "dense")]
    assert 0.6 < share[0] / share[1] <= 0.7
    run(first, *quick, "--params", "0.3", "--trust-remote-code", "-o", second)
    again = json.loads(capsys.readouterr().out)
    assert again["cost"]["dense"] == found["cost"]["pruned"]
    assert again["cost"]["pruned"]["parameters"] <= 0.7 * again["cost"]["dense"]["parameters"]
    assert len(json.loads((second / "pruned.json").read_text())["history"]) == 2
    with torch.no_grad():
        assert logits(
            load_pruned(second, trust_remote_code=True), torch.zeros(1, 3, 16, 16)
        ).shape == (1, 3)


def test_weights_that_are_not_finite_are_refused(
    pictures: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Before anything is measured; a result with them would not verify."""
    broken = small().state_dict()
    broken["classifier.bias"][1] = torch.nan
    save_file(broken, tmp_path / "w.safetensors")
    line = failing(capsys, NET, "--weights", tmp_path / "w.safetensors", "--data", pictures,
                   "--ratio", ".5", *QUICK, "-o", tmp_path / "out")  # fmt: skip
    assert "classifier.bias holds values that are not finite" in line
    assert not (tmp_path / "out").exists()


def test_a_result_that_does_not_verify_gets_no_name(
    pictures: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Written by a writer that leaves out what was removed last."""
    stock = pipeline.save_pruned
    monkeypatch.setattr(
        pipeline, "save_pruned", lambda model, source, history, to: stock(model, source, [], to)
    )
    with pytest.raises(RuntimeError, match=r"does not verify and stays in .*out.partial: cuts"):
        pipeline.prune(settings(pictures), tmp_path / "out")
    assert not (tmp_path / "out").exists()
    monkeypatch.undo()
    said: list[str] = []
    pipeline.prune(settings(pictures), tmp_path / "out", say=said.append)
    assert said[-1].startswith("verified: ")


def test_weights_of_a_function_are_used(pictures: Path, tmp_path: Path) -> None:
    torch.manual_seed(1)
    trained = small()
    save_file(trained.state_dict(), tmp_path / "w.safetensors")
    done = pipeline.prune(
        settings(pictures, ratio=0.0, weights=str(tmp_path / "w.safetensors")), tmp_path / "out"
    )
    assert same(
        load_pruned(done.output, trust_remote_code=True), trained
    )  # nothing removed: the same model


def test_a_transformers_folder_keeps_its_processor_and_labels(
    pictures: Path, tmp_path: Path
) -> None:
    from transformers import ViTImageProcessorPil

    folder, out = tmp_path / "model", tmp_path / "out"
    model = lively("vit")
    model.config.id2label = dict(enumerate(["red", "blue", "green", *"abcdefg"]))
    model.config.label2id = {v: k for k, v in model.config.id2label.items()}
    model.save_pretrained(folder)
    ViTImageProcessorPil(size={"height": 32, "width": 32}).save_pretrained(folder)
    # 'taylor-sq' and a random protection: any pair will do
    run(folder, "--data", pictures, "--params", "0.2", *QUICK[:6], "--removal", "taylor-sq",
        "--protection", "random", "--distill", "0.5", "--finetune-epochs", "1",
        "-o", out)  # fmt: skip
    source = open_pruned(out)
    assert source.labels == ("red", "blue", "green", *"abcdefg")
    assert source.processor.size == {"height": 32, "width": 32}
    assert source.model.config.id2label[2] == "green"
    result = json.loads((out / "moe_fair" / "result.json").read_text())
    cost = result["cost"]
    assert cost["pruned"]["parameters"] <= 0.8 * cost["dense"]["parameters"]
    with torch.no_grad():
        assert logits(source.model, images(2)).shape == (2, 10)


@pytest.mark.parametrize("command", [["prune", "--ratio"], ["sparsify", "--sparsity"]])
def test_names_that_only_a_report_trips_over(
    pictures: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], command: list[str]
) -> None:
    """At the end of a run, when its work is done: a layer's, and a folder's that is not UTF-8."""
    data = tmp_path / os.fsdecode(b"pictures\xff")
    data.symlink_to(pictures)
    with pytest.raises(SystemExit, match="0"):
        main([
            "vision", command[0], "vision.architectures:strange", "--data", str(data), command[1],
            "0.5", "--image-size", "16", "--samples", "18", "-o", str(tmp_path / "out"),
        ])  # fmt: skip
    said = capsys.readouterr()
    assert r"a$\frac{<b>\x1b[31m" in said.out
    assert "\x1b" not in said.out + said.err
    page = (tmp_path / "out" / "moe_fair" / "report.html").read_text()
    assert r"a$\frac{&lt;b&gt;\x1b[31m" in page
    assert r"pictures\udcff" in page


def test_labels_of_a_folder_follow_the_names_of_the_model(pictures: Path) -> None:
    data = open_data(str(pictures), lambda image: torch.zeros(3, 2, 2))
    found = matched(data.test, ("red", "blue", "green"))
    assert found.labels.tolist() == [1] * 4 + [2] * 4 + [0] * 4
    assert matched(data.test, ("x", "y")).labels.tolist() == data.test.labels.tolist()


def test_steps_score_again_and_remove_evenly(pictures: Path, tmp_path: Path) -> None:
    done = pipeline.prune(
        settings(pictures, steps=3, finetune_epochs=1, ratio=0.6), tmp_path / "out"
    )
    total = sum(g.size for g in done.plans[0].groups)
    kept = [sum(len(g.kept) for g in p.groups) for p in done.plans]
    assert kept == [round(total * (1 - 0.6 * s / 3)) for s in (1, 2, 3)]
    for before, after in zip(done.plans, done.plans[1:], strict=False):
        sizes = {g.name: len(g.kept) for g in before.groups}
        assert {g.name: g.size for g in after.groups} == sizes
        first, second = before.groups[0], after.groups[0]
        assert [first.removal[i] for i in first.kept] != second.removal
    history = json.loads((done.output / "pruned.json").read_text())["history"]
    assert len(history) == 3


@pytest.mark.parametrize(
    ("module", "place"),
    [
        pytest.param(pipeline, "cut", marks=pytest.mark.nightly),
        pytest.param(pipeline, "finetune", marks=pytest.mark.nightly),
        pytest.param(step_folder, "save_pruned", marks=pytest.mark.nightly),
        (pipeline, "write_document"),
    ],
)
def test_a_killed_run_goes_on_to_the_same_model(
    pictures: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, module: Any, place: str
) -> None:
    wanted = settings(pictures, steps=2, finetune_epochs=1)
    whole = pipeline.prune(wanted, tmp_path / "whole")
    stock, calls = getattr(module, place), []

    def stops(*args: Any, **kwargs: Any) -> Any:
        calls.append(args)
        if len(calls) == 2 or place == "write_document":
            raise KeyboardInterrupt
        return stock(*args, **kwargs)

    monkeypatch.setattr(module, place, stops)
    with pytest.raises(KeyboardInterrupt):
        pipeline.prune(wanted, tmp_path / "out")
    assert not (tmp_path / "out").exists()
    monkeypatch.setattr(module, place, stock)
    said: list[str] = []
    done = pipeline.prune(wanted, tmp_path / "out", say=said.append)
    assert any("before" in line for line in said), said
    models = [load_pruned(p.output, trust_remote_code=True) for p in (done, whole)]
    assert same(*models)
    assert not (tmp_path / "out.pruning").exists()


def test_other_settings_start_over(pictures: Path, tmp_path: Path) -> None:
    work = tmp_path / "out.pruning"
    work.mkdir()
    (work / "settings.json").write_text("{}")
    said: list[str] = []
    pipeline.prune(settings(pictures), tmp_path / "out", say=said.append)
    assert "holds a run with other settings: starting over" in said[0]


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ([], "exactly one target (--ratio, --flops, --params or --tolerance); got none"),
        (["--ratio", ".5", "--flops", ".5"], "got --ratio and --flops"),
        (["--ratio", "1.0"], "--ratio 1 is not between 0 and 1"),
        (["--flops", "nan"], "--flops nan is not between 0 and 1"),
        (["--ratio", ".5", "--removal", "u-scor"], "u-score"),
        (["--ratio", ".5", "--allocate", "todd"], "tod"),
        (["--ratio", ".5", "--steps", "2"], "give --finetune-epochs too"),
        (["--ratio", ".5", "--distill", ".5"], "give --finetune-epochs too"),
        (["--ratio", ".5", "--finetune-epochs", "1", "--lr", "0"], "--lr 0 is not above 0"),
        (["--tolerance", ".1", "--allocate", "uniform"], "--tolerance is ToD's"),
        (["--ratio", ".5", "--samples", "1"], "--samples 1 is below 2"),
        (["--ratio", ".5", "--optimizer", "adam"], "adamw"),
        (["--ratio", ".5", "--mean", "a,b"], "write numbers with commas"),
        (["--ratio", ".5", "--mean", "0.1,0.2"], "--mean has 2 values"),
        (["--ratio", ".5", "--max-memory", "x"], "--max-memory"),
        (["--ratio", ".5", "--device", "quantum"], "--device quantum"),
        (["--ratio", ".5", "--weights", "no.safetensors"], "no weights at no.safetensors"),
        (["--ratio", ".99", "--min-channels", "4"], "the target is out of reach"),
        (["--params", ".999"], "the target is out of reach"),
    ],
)
def test_bad_options(
    pictures: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    arguments: list[str],
    said: str,
) -> None:
    line = failing(
        capsys, NET, "--data", pictures, *QUICK, *arguments, "-o", tmp_path / "out"
    )  # fmt: skip
    assert said in line, line
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("model", "said"),
    [
        ("moe_fair.vision.zoo:resnet2", "no model moe_fair.vision.zoo:resnet2"),
        ("no.such.module:f", "no model no.such.module:f"),
        ("moe_fair.vision.zoo:resnet20(width=w)", "arguments must be plain values"),
        ("moe_fair.vision.zoo:resnet20(depth=3)", "unexpected keyword"),
        ("builtins:dict", "gives no torch.nn.Module"),
        ("./nothing-here", "no image classifier there"),
        ("moe_fair.vision.zoo:resnet20(2, width=4)", "labels up to 2 and the model has 2 outputs"),
    ],
)
def test_bad_models(
    pictures: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], model: str, said: str
) -> None:
    out = tmp_path / "out"
    line = failing(capsys, model, "--data", pictures, "--ratio", ".5", *QUICK, "-o", out)
    assert said in line, line


def test_a_full_output_is_refused(
    pictures: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "a").write_text("")
    line = failing(capsys, NET, "--data", pictures, "--ratio", ".5", *QUICK, "-o", tmp_path)
    assert "not empty" in line


def failing(capsys: pytest.CaptureFixture[str], *arguments: object) -> str:
    """Exit code 2 and one line; returns it."""
    with pytest.raises(SystemExit) as stop:
        main(["vision", "prune", *map(str, arguments)])
    lines = capsys.readouterr().err.strip().splitlines()
    assert stop.value.code == 2, lines
    assert lines[-1].startswith("moe-fair: error: "), lines
    assert not any("Traceback" in x for x in lines)
    return lines[-1]


def test_a_recipe_holds_the_settings_and_options_win(
    pictures: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(
        f"model: {NET}\ndata: {pictures}\nratio: 0.25\nremoval: l1\nallocate: uniform\n"
        "samples: 18\nimage_size: 16\nmean: [0.5, 0.4, 0.3]\nmemory: 64MiB\n"
    )
    run("--recipe", recipe, "--params", "0.5", "--removal", "l2", "--json", "-o", tmp_path / "out")
    found = json.loads(capsys.readouterr().out)["settings"]
    assert found["mean"] == [0.5, 0.4, 0.3]
    assert (found["params"], found["removal"], found["memory"]) == (0.5, "l2", 64 << 20)
    assert "ratio" not in found
    line = failing(capsys, NET, "--ratio", ".5", "-o", tmp_path / "b")
    assert "give --data, here or in a --recipe" in line
    for text, said in (
        ("rato: 0.5", "no setting 'rato' (did you mean 'ratio'?)"),
        ("ratio: half", "--ratio must be a number, not 'half'"),
        ("- ratio", "holds no settings"),
    ):
        recipe.write_text(text)
        line = failing(capsys, NET, "--data", pictures, "--recipe", recipe, "-o", tmp_path / "b")
        assert said in line, line


PRUNING = [
    p for p in sorted((ROOT / "recipes" / "vision").glob("*.yaml"))
    if "vision prune --recipe" in p.read_text()
]  # fmt: skip


@pytest.mark.parametrize("recipe", PRUNING, ids=str)
def test_the_recipes_hold_settings_that_are_accepted(recipe: Path) -> None:
    from moe_fair.cli.vision import _written

    assert Settings.of(_written(recipe, Settings)).finetune_epochs > 0
    header = [line for line in recipe.read_text().splitlines() if line.startswith("#")]
    assert f"--recipe {recipe.stem} -o" in "\n".join(header)
