"""What moe_fair does with a model, on a device that is named: numbers to be set side by side.

    python tests/device/pretend.py tests/device/stages.py MODEL FOLDER cuda [STAGE ...]

prints one line of JSON: of every stage its numbers, and on the pretend device what was counted.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

import moe_fair
from moe_fair.core.recipe import Recipe
from moe_fair.core.units import Statistics
from moe_fair.engines.oom import release
from moe_fair.moe.checkpoint_source import Checkpoint
from moe_fair.moe.repairs import repairs
from moe_fair.pipelines import moe as pipeline
from moe_fair.pipelines.evaluate import run_agreement

TEXT = Path(__file__).parents[2] / "eval" / "text"
TASKS = TEXT.with_name("tasks")
SMALL: dict[str, Any] = {
    "calibration": str(TEXT / "calibration"), "samples": 8, "length": 24,
    "batch_size": 4, "dtype": "float32",
}  # fmt: skip
FOR = ("fair", "fair-u", "counterfactual-agreed", "naee", "mone")
ALL = {**SMALL, "for_": FOR}
JUDGED = {"heldout": str(TEXT / "heldout" / "python.jsonl"), "heldout_samples": 4}
HEALED: dict[str, Any] = {
    "samples": 40, "heal": 1000, "repair": "none", "rivals": (), "self_share": 0,
}  # fmt: skip
Numbers = dict[str, list[float]]
Stage = Callable[[Path, str, Path], Numbers]


def numbers(found: Statistics) -> Numbers:
    made = {}
    for group, sums in found.sums.items():
        made |= {f"{group} {n}": t.flatten().tolist() for n, t in sums.items()}
    return made | {f"{g} rows": t.flatten().tolist() for g, t in found.rows.items()}


def calibrated(**more: Any) -> Stage:
    def stage(model: Path, device: str, folder: Path) -> Numbers:
        return numbers(moe_fair.calibrate(str(model), device=device, **{**ALL, **more}))

    return stage


def little_room(model: Path, device: str, folder: Path) -> Numbers:
    """Streamed, layers' inputs in three places: a batch's of 24 × 4 × 32 numbers is 12 kB."""
    from moe_fair.engines import streaming

    stock = streaming.Boundaries

    def small(device_bytes: int, host_bytes: int) -> streaming.Boundaries:
        assert (host_bytes > 0) == (device != "cpu")
        return stock(30_000, 30_000 if host_bytes else 0)

    streaming.Boundaries = small  # type: ignore[assignment, misc]
    try:
        return calibrated(engine="streaming")(model, device, folder)
    finally:
        streaming.Boundaries = stock  # type: ignore[misc]


def over_two(stage: Callable[..., Stage], **settings: Any) -> Stage:
    """The same with a layer a device; on a CPU all of it is there."""

    def spread(model: Path, device: str, folder: Path) -> Numbers:
        if device == "cpu":
            return stage(**settings)(model, device, folder)
        file = folder / "map.json"
        last = {"model.layers.1": 1, "model.norm": 1, "lm_head": 1}
        file.write_text(json.dumps({"": 0, **last}))
        return stage(**settings, device_map=str(file))(model, device, folder)

    return spread


def pruned(**more: Any) -> Stage:
    def stage(model: Path, device: str, folder: Path) -> Numbers:
        settings = {**SMALL, **JUDGED, "ratio": 0.5, "device": device, **more}
        done = moe_fair.prune(str(model), folder / "out", **settings)
        assert done.before is not None
        assert done.after is not None
        made = {f"kept {g.name}": list(map(float, g.kept)) for g in done.plan.groups}
        made |= {"heldout": [done.before.mean, done.after.mean]}
        told = done.plan.explanation.get("trials", {})
        # a change is far smaller than the loss, in which float32 rounds
        made |= {f"trial {n}": [told["loss"] + v] for n, v in told.get("changes", {}).items()}
        for file in sorted((folder / "out").glob("*.safetensors")):
            made |= {n: t.float().flatten().tolist() for n, t in load_file(file).items()}
        return made

    return stage


def oracle(model: Path, device: str, folder: Path) -> Numbers:
    recipe = Recipe().with_settings({**SMALL, "model": model, "device": device})
    found, _ = pipeline.oracle(recipe, folder / "oracle")
    return {n: list(map(float, v)) for n, v in found.changes.items()}


def agreement(model: Path, device: str, folder: Path) -> Numbers:
    """KL, acceptance and top-1 of a cut model to the original."""
    out, given = folder / "out", {"dtype": "float32", "length": 24, "batch_size": 4, **JUDGED}
    moe_fair.prune(str(model), out, ratio=0.5, device=device, repair="none", rivals=(), **SMALL)
    recipe = Recipe().with_settings({**given, "model": model, "device": device})
    mean = run_agreement(recipe, Checkpoint(str(out)), Checkpoint(str(model)), None).mean
    return {"agreement": [mean.kl, mean.acceptance, mean.top1]}


def asked(model: Path, device: str, folder: Path) -> Numbers:
    """lm-eval's accuracy and log-likelihoods on four questions."""
    from moe_fair.evaluate.benchmark import Benchmark, run

    given = {"limit": 4, "batch_size": "2", "dtype": "float32", "device": device}
    tasks = Benchmark(("local_choice_python",), include_path=TASKS, **given)
    done = run(Checkpoint(str(model)), tasks)
    [answers] = done["samples"].values()
    likely = [float(x[0][0]) for a in answers for x in a["resps"]]
    return {"accuracy": [float(a["acc"]) for a in answers], "likely": likely}


def pictured(**more: Any) -> Stage:
    """A pruned classifier of scikit-learn's digits."""

    def stage(model: Path, device: str, folder: Path) -> Numbers:
        from moe_fair.pipelines import vision
        from moe_fair.vision.settings import Settings

        given = {
            "model": "moe_fair.vision.zoo:vgg_small", "data": "digits", "batch_size": 32,
            "ratio": 0.5, "seed": 1, "device": device,
        }  # fmt: skip
        done = vision.prune(Settings.of({**given, **more}), folder / "out")
        made = {f"kept {g.name}": list(map(float, g.kept)) for g in done.plans[-1].groups}
        for file in sorted((folder / "out").glob("*.safetensors")):
            weights = load_file(file)
            made |= {f"{n} weight": t.float().flatten().tolist() for n, t in weights.items()}
        return made

    return stage


def thinned(model: Path, device: str, folder: Path) -> Numbers:
    """The same net with zeros, repaired."""
    from moe_fair.pipelines import sparse
    from moe_fair.vision.sparse.settings import SparseSettings

    given = {
        "model": "moe_fair.vision.zoo:vgg_small", "data": "digits", "samples": 32,
        "batch_size": 32, "sparsity": 0.8, "device": device,
    }  # fmt: skip
    sparse.sparsify(SparseSettings.of(given), folder / "out")
    [file] = (folder / "out").glob("*.safetensors")
    return {f"{n} weight": t.float().flatten().tolist() for n, t in load_file(file).items()}


STAGES: dict[str, Stage] = {
    "resident": calibrated(),
    "checkpointed": calibrated(checkpointing=True),
    "streaming": calibrated(engine="streaming"),
    "streaming, little room": little_room,
    "two devices": over_two(calibrated),
    "own text": calibrated(calibration="self", for_=FOR[:1]),
    **{f"repair {k}": pruned(repair=k, rivals=()) for k in repairs() if k != "novice"},
    "streamed repair": pruned(repair="distill", engine="streaming", rivals=()),
    "healed": pruned(**HEALED),
    "healed, two devices": over_two(pruned, **HEALED),
    "default": pruned(samples=64, length=16, self_share=0),
    "curves": pruned(method="taylor-sq", allocate="curves", repair="none", rivals=()),
    "oracle": oracle,
    "agreement": agreement,
    "lm-eval": asked,
    "images": pictured(samples=32, directions=8),
    "images, trained": pictured(samples=32, directions=8, finetune_epochs=1),
    "images, Taylor while training": pictured(method="taylor-fo", minibatches=2),
    "sparse": thinned,
}


def said(model: Path, device: str, folder: Path, **more: Any) -> list[str]:
    """What `prune` says on its way."""
    heard: list[str] = []
    given = {**SMALL, **JUDGED, "ratio": 0.5, "repair": "refit", "rivals": (), **more}
    recipe = Recipe().with_settings({**given, "model": model, "device": device})
    pipeline.prune(recipe, folder / "out", say=heard.append)
    return heard


DEFAULT: dict[str, Any] = {
    "samples": 64, "length": 16, "self_share": 0, "repair": "distill", "rivals": None,
}  # fmt: skip
SAID: dict[str, dict[str, Any]] = {"said": {}, "said by default": DEFAULT}


def run(model: Path, folder: Path, device: str, names: list[str]) -> Iterator[tuple[str, Any]]:
    """Each stage's numbers; on the pretend device with what was counted."""
    counts = getattr(sys.modules.get("pretend"), "COUNTS", None)
    for name in names or STAGES:
        home = folder / name.replace(" ", "-")
        home.mkdir(parents=True)
        if counts is not None:
            counts.clear()
        if name in SAID:
            found: dict[str, Any] = {"said": said(model, device, home, **SAID[name])}
        else:
            found = {"numbers": STAGES[name](model, device, home)}
        if counts is not None:
            release()
            release()  # accelerate's hooks over two devices go with the second search
            tables = ("waits", "to device", "launches", "float64", "out of memory")
            found |= {"counts": {t: counts.total(t) for t in tables}}
            found |= {"live": counts.live, "peak": counts.peak}
            found["lines"] = {t: counts.tables[t].most_common(8) for t in tables}
        yield name, found


if __name__ == "__main__":
    torch.set_num_threads(1)
    model, folder, device, *names = sys.argv[1:]
    for made in run(Path(model), Path(folder), device, names):
        print(json.dumps(made), flush=True)
