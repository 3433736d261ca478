"""What a failed run left is taken up by the same model, code and images alone."""

from __future__ import annotations

import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from vision.architectures import small
from vision.test_vision_flow import settings

from moe_fair.pipelines import vision as pipeline
from moe_fair.vision.settings import Settings

CODE = """
from vision.architectures import small as stock

def small():
    model = stock()
    model.register_forward_pre_hook(lambda m, x: (x[0] * {factor},))
    return model
"""


@pytest.fixture
def run(
    pictures: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Callable[..., tuple[Path, list[str]]]:
    """Prune into a folder; ended within the second step's fine-tuning where asked."""
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "net_of_mine", raising=False)  # of the test before
    shutil.copytree(pictures, tmp_path / "data")
    torch.manual_seed(5)
    save_file(small().state_dict(), tmp_path / "weights.safetensors")
    (tmp_path / "net_of_mine.py").write_text(CODE.format(factor="1.0"))
    stock = pipeline.finetune

    def go(name: str, *, ends: bool = False) -> tuple[Path, list[str]]:
        calls: list[int] = []

        def finetune(*args: Any, **kwargs: Any) -> Any:
            calls.append(1)
            if ends and len(calls) == 2:
                raise KeyboardInterrupt
            return stock(*args, **kwargs)

        monkeypatch.setattr(pipeline, "finetune", finetune)
        monkeypatch.setattr(pipeline, "latency", lambda *_: [])
        given: Settings = settings(
            tmp_path / "data", model="net_of_mine:small", steps=2, finetune_epochs=1,
            weights=str(tmp_path / "weights.safetensors"), trust_remote_code=True,
        )  # fmt: skip
        said: list[str] = []
        if ends:
            with pytest.raises(KeyboardInterrupt):
                pipeline.prune(given, tmp_path / name, say=said.append)
        else:
            pipeline.prune(given, tmp_path / name, say=said.append)
        return tmp_path / name, said

    return go


def weights(folder: Path) -> None:
    tensors = load_file(folder / "weights.safetensors")
    name = next(n for n, t in sorted(tensors.items()) if t.is_floating_point())
    tensors[name] = tensors[name] + 0.1  # the same names, shapes and size on disk
    save_file(tensors, folder / "weights.safetensors")


def images(folder: Path) -> None:
    file = folder / "data" / "train" / "red" / "3.png"
    pixels = np.array(Image.open(file))
    pixels[0, 0, 0] ^= 1
    Image.fromarray(pixels).save(file)


def labels(folder: Path) -> None:
    a, b = (folder / "data" / "train" / c / "0.png" for c in ("red", "blue"))
    kept = a.read_bytes()
    a.write_bytes(b.read_bytes())
    b.write_bytes(kept)


def code(folder: Path) -> None:
    import net_of_mine  # type: ignore[import-not-found]

    (folder / "net_of_mine.py").write_text(CODE.format(factor="0.5"))
    exec((folder / "net_of_mine.py").read_text(), net_of_mine.__dict__)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("change", "named"),
    [
        (weights, "weights"),
        pytest.param(labels, "images", marks=pytest.mark.nightly),
        pytest.param(code, "code", marks=pytest.mark.nightly),
        pytest.param(images, "images", marks=pytest.mark.nightly),
    ],
)
def test_what_another_model_left_is_not_taken_up(
    run: Callable[..., tuple[Path, list[str]]],
    tmp_path: Path,
    change: Callable[[Path], None],
    named: str,
) -> None:
    run("out", ends=True)
    assert (tmp_path / "out.pruning" / "step-1" / "step.json").is_file()
    change(tmp_path)
    out, said = run("out")
    assert f"holds a run with other {named}: starting over" in said[0] + said[1]
    assert not any("done before" in line for line in said)
    whole, _ = run("whole")
    name = "model.safetensors"
    assert (out / name).read_bytes() == (whole / name).read_bytes()


@pytest.mark.slow
def test_the_same_goes_on(run: Callable[..., tuple[Path, list[str]]], tmp_path: Path) -> None:
    run("out", ends=True)
    _, said = run("out")
    assert any("step 1 of 2: done before" in line for line in said)
    assert not any("starting over" in line for line in said)
