"""What a CUDA device would do to every stage, on a pretend one: see pretend.py.

Its numbers are the CPU's, nothing stays on it between stages, and how often the host waits for it,
copies to it and starts kernels only goes down.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from places import MODEL, ROOT
from tiny import tiny_model
from transformers import AutoTokenizer

sys.path.insert(0, str(Path(__file__).parent))
import stages

QUICK = ("resident", "streaming", "two devices", "own text", "repair refit")
REST = tuple(n for n in stages.STAGES if n not in QUICK)
# on 8 sequences of 24 tokens in 4 batches and 2 MoE layers of 8 experts, but for `default`:
# waits for the device, copies to it, launches, and thousands of float64 elements
CEILINGS = {
    "resident": (170, 70, 4300, 970),
    "checkpointed": (170, 70, 5300, 970),
    "streaming": (190, 190, 5500, 970),
    "two devices": (175, 115, 4400, 970),
    "own text": (115, 100, 8200, 230),
    "repair channel": (230, 195, 6900, 940),
    "repair distill": (720, 255, 26000, 5200),
    "repair matrix": (330, 255, 14200, 6000),
    "repair refit": (400, 255, 14700, 5200),
    "repair scale": (205, 195, 6800, 730),
    "repair variance": (205, 195, 6900, 710),
    "streamed repair": (740, 570, 27500, 5200),
    "default": (2450, 610, 108000, 27500),
    "curves": (320, 190, 9100, 330),
    "oracle": (460, 115, 13000, 870),
    "agreement": (115, 145, 4000, 6200),
}
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(shutil.which("g++") is None, reason="the pretend device needs g++"),
]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("model")
    tokenizer = AutoTokenizer.from_pretrained(MODEL)
    torch.manual_seed(0)
    made = tiny_model(
        "qwen2_moe", vocab_size=len(tokenizer), num_hidden_layers=2, num_experts=8,
        hidden_size=32, moe_intermediate_size=16,
    )  # fmt: skip
    made.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def on_device(model: Path, folder: Path, *names: str, **environment: str) -> Iterator[Any]:
    """Stages in a process that sees a pretend device from its start."""
    here = Path(__file__).parent
    command = [
        sys.executable,
        here / "pretend.py",
        here / "stages.py",
        model,
        folder,
        "cuda",
        *names,
    ]
    path = f"{ROOT}{os.pathsep}{os.environ.get('PYTHONPATH', '')}"
    done = subprocess.run(
        [str(c) for c in command], capture_output=True, text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": path, **environment},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    return map(json.loads, done.stdout.splitlines())


def held_to(model: Path, folder: Path, names: tuple[str, ...]) -> None:
    (folder / "cpu").mkdir()
    expected = dict(stages.run(model, folder / "cpu", "cpu", list(names)))
    (folder / "cuda").mkdir()
    found = dict(on_device(model, folder / "cuda", *names, PRETEND_GPUS="2"))
    assert found.keys() == expected.keys()
    for name, its in found.items():
        assert its["numbers"].keys() == expected[name]["numbers"].keys()
        for what, values in expected[name]["numbers"].items():
            a, b = torch.tensor(values).double(), torch.tensor(its["numbers"][what]).double()
            largest = float(a.abs().max()) if len(a) else 0.0
            torch.testing.assert_close(
                b,
                a,
                atol=3e-5 * largest + 1e-9,
                rtol=0,
                msg=lambda m, w=f"{name}: {what}": f"{w}: {m}",
            )
        assert its["live"] == [0, 0], name
        counts = its["counts"]
        measured = (
            counts["waits"],
            counts["to device"],
            counts["launches"],
            counts["float64"] // 1000,
        )
        over = [m > c for m, c in zip(measured, CEILINGS[name], strict=True)]
        assert not any(over), (name, measured, CEILINGS[name], its["lines"])


def test_the_same_numbers_by_the_rules_of_a_device(model: Path, tmp_path: Path) -> None:
    held_to(model, tmp_path, QUICK)


@pytest.mark.nightly
def test_the_rest_of_the_stages(model: Path, tmp_path: Path) -> None:
    held_to(model, tmp_path, REST)


@pytest.mark.parametrize(
    "name", ["said", pytest.param("said by default", marks=pytest.mark.nightly)]
)
def test_a_device_that_is_too_small(model: Path, tmp_path: Path, name: str) -> None:
    """Weights take 1.2 MB, logits of a batch 2: stages make do, in words, and end."""
    [(_, found)] = on_device(model, tmp_path, name, PRETEND_BYTES="4e6")
    lines = found["said"]
    assert found["counts"]["out of memory"] >= 4
    assert found["live"] == [0]
    for words in (
        "sequences at a time instead of", "again one layer at a time",
        "again with what is not in use in main memory",
    ):  # fmt: skip
        assert any(words in line for line in lines), (words, lines)
    assert not any("not repaired" in line for line in lines)


def test_packed_layers_are_unpacked_on_the_device(tmp_path: Path) -> None:
    here = Path(__file__).parent
    path = f"{ROOT}{os.pathsep}{os.environ.get('PYTHONPATH', '')}"
    done = subprocess.run(
        [sys.executable, str(here / "pretend.py"), str(here / "packed.py"), str(tmp_path)],
        capture_output=True, text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": path},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    assert len(done.stdout.split("\n")) > 10
