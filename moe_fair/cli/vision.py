"""The commands under `moe-fair vision`: options, a call, a screen."""

from __future__ import annotations

import typing
from pathlib import Path
from typing import Annotated, Any

import typer

from moe_fair.cli.options import (
    AllowPickle,
    Debug,
    Device,
    Json,
    Output,
    RecipeFile,
    Revision,
    option,
)
from moe_fair.cli.terminal import say
from moe_fair.core.recipe import check_trust, parse_bytes, read_settings
from moe_fair.core.registry import check_settings
from moe_fair.core.settings import coerce

SCORE, TARGET, GRADUAL, TRAIN, MODEL, RUN = (
    "Scores and budget",
    "Target (exactly one)",
    "Removal while training, with --method",
    "Fine-tuning",
    "Models given as module:function",
    "Running",
)

app = typer.Typer(
    help="Prune channels of image classifiers: CNNs and vision transformers.",
    no_args_is_help=True,
)

Model = Annotated[
    str | None,
    typer.Argument(
        help="Hub id or folder, module:function, or a pruned checkpoint", show_default=False
    ),
]
Data = Annotated[
    str | None,
    option("--data", text="digits, a folder of class folders, or a dataset id[:config][@split]"),
]
Ratio = Annotated[
    float | None, option("--ratio", text="Share of the units removed, 0 to 1", panel=TARGET)
]
Flops = Annotated[
    float | None, option("--flops", text="Share of the multiply-adds removed", panel=TARGET)
]
Params = Annotated[
    float | None, option("--params", text="Share of the parameters removed", panel=TARGET)
]
Tolerance = Annotated[
    float | None,
    option(
        "--tolerance",
        text="ToD's α and no budget: each group goes as deep as it allows",
        panel=TARGET,
    ),
]
Removal = Annotated[
    str | None,
    option(
        "--removal",
        text="Criterion whose lowest scores leave: u-score, l1, l2, bn-scale, hrank, taylor, "
        "taylor-sq, taylor-so, taylor-logits, taylor-logits-sq, taylor-weight or random  "
        "[default: u-score]",
        panel=SCORE,
    ),
]
Protection = Annotated[
    str | None,
    option(
        "--protection",
        text="Criterion whose highest scores are protected  [default: taylor]",
        panel=SCORE,
    ),
]
Allocate = Annotated[
    str | None,
    option(
        "--allocate", text="tod, uniform, global or global-normalised  [default: tod]", panel=SCORE
    ),
]
Method = Annotated[
    str | None,
    option(
        "--method",
        text="In place of the scores: taylor-fo, taylor-so or taylor-bn, units leave a few at a "
        "time while the model trains",
        panel=GRADUAL,
    ),
]
UnitsPerStep = Annotated[
    int | None,
    option(
        "--units-per-step",
        text="Units that leave after a step  [default: 100, or a hundredth of fewer than 10,000]",
        panel=GRADUAL,
    ),
]
Minibatches = Annotated[
    int | None,
    option("--minibatches", text="Minibatches of a step  [default: 30]", panel=GRADUAL),
]
Momentum = Annotated[
    float | None,
    option(
        "--momentum", text="Share of earlier steps in a unit's score  [default: 0.9]", panel=GRADUAL
    ),
]
Probes = Annotated[
    int | None,
    option(
        "--probes",
        text="Random directions per minibatch for taylor-so's second derivatives; as many as units "
        "is exact  [default: 1]",
        panel=GRADUAL,
    ),
]
MinChannels = Annotated[
    int | None,
    option("--min-channels", text="Fewest units kept in any group  [default: 1]", panel=SCORE),
]
Align = Annotated[
    int | None,
    option(
        "--align",
        text="Kept counts are multiples of this; smaller groups stay whole  [default: 1]",
        panel=SCORE,
    ),
]
Samples = Annotated[
    int | None, option("--samples", text="Images for the scores  [default: 640]", panel=SCORE)
]
Directions = Annotated[
    int | None,
    option("--directions", text="Projections of the sliced distance  [default: 128]", panel=SCORE),
]
Seed = Annotated[
    int | None,
    option(
        "--seed",
        text="Draws images, directions and the order of training  [default: 0]",
        panel=SCORE,
    ),
]
Steps = Annotated[
    int | None,
    option(
        "--steps",
        text="Prune in so many steps, fine-tune and score again after each  [default: 1]",
        panel=TRAIN,
    ),
]
Epochs = Annotated[
    int | None,
    option("--finetune-epochs", text="Epochs after each step  [default: 0]", panel=TRAIN),
]
Optimizer = Annotated[
    str | None,
    option(
        "--optimizer",
        text="sgd (lr .001, momentum .9) or adamw (lr .0005, cosine to 0)  [default: sgd]",
        panel=TRAIN,
    ),
]
Rate = Annotated[
    float | None, option("--lr", text="Learning rate in place of the preset's", panel=TRAIN)
]
Distill = Annotated[
    float | None,
    option(
        "--distill",
        text="Weight of the dense model's outputs in the loss, 0 to 1  [default: 0]",
        panel=TRAIN,
    ),
]
Weights = Annotated[
    str | None, option("--weights", text="Safetensors file to fill the model with", panel=MODEL)
]
ImageSize = Annotated[
    int | None, option("--image-size", text="Side of the images  [default: 32]", panel=MODEL)
]
Mean = Annotated[
    str | None,
    option(
        "--mean",
        text="Of the pixels in 0..1, one number or one a channel  [default: 0.5]",
        panel=MODEL,
    ),
]
Std = Annotated[str | None, option("--std", text="Likewise  [default: 0.5]", panel=MODEL)]
BatchSize = Annotated[
    int | None, option("--batch-size", text="Images per batch  [default: 64]", panel=RUN)
]
MaxMemory = Annotated[
    str | None,
    option(
        "--max-memory",
        text="For the U-Score's projections; less means more passes  [default: 1GiB]",
        panel=RUN,
    ),
]
SPARSE = "Zeros and repair"
Sparsity = Annotated[
    float | None,
    option("--sparsity", text="Share of the weights that are zero, 0 to 1", panel=SPARSE),
]
SparseAllocate = Annotated[
    str | None,
    option(
        "--allocate",
        text="uniform, erk, lamp, global, tod, rr or rr-erk  [default: lamp]",
        panel=SPARSE,
    ),
]
Repair = Annotated[
    str | None,
    option(
        "--repair",
        text="variance (every channel's mean and variance as before) or none  [default: variance]",
        panel=SPARSE,
    ),
]
Shrinkage = Annotated[
    float | None,
    option(
        "--shrinkage",
        text="Holds the repair of channels back that have little signal left; 0 does not  "
        "[default: 0.003]",
        panel=SPARSE,
    ),
]
Calibration = Annotated[
    int | None,
    option(
        "--samples",
        text="Images for allocation and repair, without their labels; the repair runs all of them "
        "in one forward  [default: 256]",
        panel=SPARSE,
    ),
]
DrawSeed = Annotated[int | None, option("--seed", text="Draws them  [default: 0]", panel=SPARSE)]
Heads = Annotated[bool | None, option("--heads", text="Attention heads are units too", panel=SCORE)]
Trust = Annotated[
    bool | None,
    option("--trust-remote-code", text="Run code that a model brings or names", panel=RUN),
]
Fresh = Annotated[bool, option("--fresh", text="Discard what a killed run left", panel=RUN)]


@app.callback()
def _vision() -> None:
    pass


@app.command()
def prune(
    model: Model = None, data: Data = None, output: Output = ...,  # type: ignore[assignment]
    recipe: RecipeFile = None,
    ratio: Ratio = None, flops: Flops = None, params: Params = None, tolerance: Tolerance = None,
    removal: Removal = None, protection: Protection = None, allocate: Allocate = None,
    method: Method = None, units_per_step: UnitsPerStep = None, minibatches: Minibatches = None,
    momentum: Momentum = None, probes: Probes = None,
    min_channels: MinChannels = None, align: Align = None, heads: Heads = None,
    samples: Samples = None, directions: Directions = None, seed: Seed = None,
    steps: Steps = None, finetune_epochs: Epochs = None, optimizer: Optimizer = None,
    learning_rate: Rate = None, distill: Distill = None,
    weights: Weights = None, image_size: ImageSize = None, mean: Mean = None, std: Std = None,
    batch_size: BatchSize = None, memory: MaxMemory = None, device: Device = None,
    revision: Revision = None, trust_remote_code: Trust = None,
    allow_pickle: AllowPickle = None, fresh: Fresh = False,
    as_json: Json = False, debug: Debug = False,
) -> None:  # fmt: skip
    """Score, plan, cut and fine-tune: a smaller classifier that load_pruned reads."""
    given = {k: v for k, v in locals().items() if v is not None}
    for name in ("output", "recipe", "fresh", "as_json", "debug"):
        given.pop(name, None)
    for name, flag in (("mean", "--mean"), ("std", "--std")):
        if name in given:
            given[name] = _numbers(flag, given[name])
    if memory is not None:
        given["memory"] = parse_bytes("--max-memory", memory)
    from moe_fair.cli import vision_tables as screen
    from moe_fair.pipelines import vision as pipeline
    from moe_fair.vision.settings import TARGETS, Settings

    if recipe is not None:
        written = _written(recipe, Settings)
        if any(t in given for t in TARGETS):  # a target here replaces whichever is written there
            written = {k: v for k, v in written.items() if k not in TARGETS}
        given = {**written, **given}
    for name, wanted in (("model", "a MODEL"), ("data", "--data")):
        if name not in given:
            raise ValueError(f"give {wanted}, here or in a --recipe")
    done = pipeline.prune(Settings.of(given), output, start_over=fresh, say=say)
    if as_json:
        print(screen.as_json(done))
    else:
        screen.show(done)


@app.command()
def sparsify(
    model: Model = None, data: Data = None, output: Output = ...,  # type: ignore[assignment]
    recipe: RecipeFile = None,
    sparsity: Sparsity = None, allocate: SparseAllocate = None, repair: Repair = None,
    shrinkage: Shrinkage = None, samples: Calibration = None, seed: DrawSeed = None,
    weights: Weights = None, image_size: ImageSize = None, mean: Mean = None, std: Std = None,
    batch_size: BatchSize = None, device: Device = None, revision: Revision = None,
    trust_remote_code: Trust = None, allow_pickle: AllowPickle = None, as_json: Json = False,
    debug: Debug = False,
) -> None:  # fmt: skip
    """Set single weights to zero and repair: the same shapes, which load_pruned reads."""
    given = {k: v for k, v in locals().items() if v is not None}
    for name in ("output", "recipe", "as_json", "debug"):
        given.pop(name, None)
    for name, flag in (("mean", "--mean"), ("std", "--std")):
        if name in given:
            given[name] = _numbers(flag, given[name])
    from moe_fair.cli import sparse_tables as screen
    from moe_fair.pipelines import sparse as pipeline
    from moe_fair.vision.sparse.settings import SparseSettings

    if recipe is not None:
        given = {**_written(recipe, SparseSettings), **given}
    for name, wanted in (("model", "a MODEL"), ("data", "--data"), ("sparsity", "--sparsity")):
        if name not in given:
            raise ValueError(f"give {wanted}, here or in a --recipe")
    done = pipeline.sparsify(SparseSettings.of(given), output, say=say)
    if as_json:
        print(screen.as_json(done))
    else:
        screen.show(done)


def _written(path: Path, kind: type) -> dict[str, Any]:
    """The settings of a recipe file, each of its type."""
    hints = typing.get_type_hints(kind)
    found = {}
    raw = read_settings(path)
    try:
        check_trust(raw)
    except ValueError as e:
        raise ValueError(f"{path}: {e}") from e
    for name, value in raw.items():
        check_settings([name], list(hints), f" in {path}")
        if name == "memory" and isinstance(value, str):
            value = parse_bytes("memory", value)
        found[name] = coerce(name, value, hints[name])
    return found


def _numbers(flag: str, text: str) -> tuple[float, ...]:
    try:
        return tuple(float(t) for t in text.split(","))
    except ValueError:
        raise ValueError(
            f"{flag} {text!r}: write numbers with commas, as 0.485,0.456,0.406"
        ) from None
