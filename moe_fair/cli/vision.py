"""The commands under `moe-fair vision`: options, a call, a screen."""

from __future__ import annotations

import json
import os
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import typer

from moe_fair.cli.options import Debug, Json, Output, Pruned, RecipeFile, option
from moe_fair.cli.schema import Command, takes
from moe_fair.cli.terminal import say
from moe_fair.core.bundled_recipes import VISION, recipe_path
from moe_fair.core.garbage import uncollected
from moe_fair.core.recipe_file import check_trust, read_settings
from moe_fair.core.registry import check_settings
from moe_fair.core.settings import settings_of
from moe_fair.vision.run_settings import PRUNE, RUN, SPARSIFY
from moe_fair.vision.settings import TARGETS, Settings
from moe_fair.vision.sparse.settings import SparseSettings

app = typer.Typer(
    help="Prune channels of image classifiers: CNNs and vision transformers.",
    no_args_is_help=True,
    rich_markup_mode=None,
)

ExportTo = Annotated[str, option("--to", text="Format: onnx, exported (.pt2) or torchscript")]
ExportFile = Annotated[
    Path | None, option("-o", "--output", text="File to write  [default: OUT.onnx, .pt2 or .pt]")
]
OwnCode = Annotated[
    bool, option("--trust-remote-code", text="Run the model function that the checkpoint names")
]
Fresh = Annotated[bool, option("--fresh", text="Discard what a killed run left", panel=RUN)]


@app.callback()
def _vision() -> None:
    # a MODEL may be of a module of one's own; last, so that none hides what is installed
    sys.path.append(os.getcwd())


@app.command(cls=Command)
@takes(Settings, PRUNE)
def prune(
    given: dict[str, Any], output: Output = ..., recipe: RecipeFile = None,  # type: ignore[assignment]
    fresh: Fresh = False, as_json: Json = False, debug: Debug = False,
) -> None:  # fmt: skip
    """Score, plan, cut and fine-tune: a smaller classifier that load_pruned reads."""
    if recipe is not None:
        written = _written(recipe, Settings)
        if any(t in given for t in TARGETS):  # a target here replaces whichever is written there
            written = {k: v for k, v in written.items() if k not in TARGETS}
        given = {**written, **given}
    _check_named(given, {"model": "a MODEL", "data": "--data"})
    with uncollected():
        settings = Settings.of(given)
        from moe_fair.cli.render import render
        from moe_fair.pipelines import vision as pipeline
        from moe_fair.report.vision import summary

    done = pipeline.prune(settings, output, start_over=fresh, own_process=True, say=say)
    if as_json:
        print(json.dumps(done.plain(), indent=1))
    else:
        render(summary(done.plans, done.result, done.output))


@app.command(cls=Command)
@takes(SparseSettings, SPARSIFY)
def sparsify(
    given: dict[str, Any], output: Output = ..., recipe: RecipeFile = None,  # type: ignore[assignment]
    as_json: Json = False, debug: Debug = False,
) -> None:  # fmt: skip
    """Set single weights to zero and repair: the same shapes, which load_pruned reads."""
    if recipe is not None:
        given = {**_written(recipe, SparseSettings), **given}
    wanted = {"model": "a MODEL", "data": "--data", "sparsity": "--sparsity"}
    _check_named(given, wanted)
    with uncollected():
        settings = SparseSettings.of(given)
        from moe_fair.cli.render import render
        from moe_fair.pipelines import sparse as pipeline
        from moe_fair.report.sparse import summary

    done = pipeline.sparsify(settings, output, say=say)
    if as_json:
        print(json.dumps(done.plain(), indent=1))
    else:
        render(summary(done.result, done.output))


@app.command(cls=Command)
def export(
    out: Pruned, to: ExportTo, file: ExportFile = None, trust: OwnCode = False,
    as_json: Json = False, debug: Debug = False,
) -> None:  # fmt: skip
    """Write a pruned classifier for onnxruntime, torch.export or LibTorch, and check it."""
    from moe_fair.publish.classifier import export_classifier

    made = export_classifier(out, to, file=file, trust_remote_code=trust, say=say)
    if as_json:
        print(json.dumps(asdict(made), default=str, indent=1))
    else:
        shape = " × ".join(map(str, made.shape))
        print(
            f"{made.file}: {made.bytes / 1e6:.2f} MB, takes {shape}; its outputs are within "
            f"{made.difference:.1g} of the checkpoint's"
        )


def _check_named(given: dict[str, Any], wanted: dict[str, str]) -> None:
    """What no run can do without is there.

    Raises:
        ValueError: it is not.
    """
    for name, what in wanted.items():
        if name not in given:
            raise ValueError(f"give {what}, here or in a --recipe")


def _written(path: Path, kind: type) -> dict[str, Any]:
    """The settings of a recipe file."""
    path = recipe_path(path, VISION)
    found = read_settings(path)
    try:
        check_trust(found)
    except ValueError as e:
        raise ValueError(f"{path}: {e}") from e
    check_settings(found, settings_of(kind), f" in {path}")
    return found
