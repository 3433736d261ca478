"""Devices that cannot serve are refused at once, in one line that says why."""

from __future__ import annotations

import ast
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from places import CALIBRATION, MODEL, ROOT

from moe_fair.engines.device import pick_device
from moe_fair.engines.oom import out_of_memory


@pytest.mark.parametrize("device", ["mps", "xpu", "xpu:3", "privateuseone"])
def test_a_device_that_is_not_there_or_has_no_float64(
    device: str, tmp_path: Path, fails: Callable[..., str]
) -> None:
    text = ["-c", CALIBRATION, "--samples", 8, "--length", 64]
    line = fails("calibrate", MODEL, *text, "--device", device, "-o", tmp_path / "stats")
    assert f"--device {device}: statistics are summed in float64, which it does not give" in line
    assert "use --device cpu" in line
    assert not (tmp_path / "stats").exists()


def test_auto_passes_over_an_accelerator_without_float64(monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a Mac: torch names a device that cannot hold what is asked of it."""
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: True)
    monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda: torch.device("mps"))
    assert pick_device("auto") == torch.device("cpu")


def test_a_card_that_is_not_there(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert pick_device("cuda:1") == torch.device("cuda", 1)
    with pytest.raises(ValueError, match=r"--device cuda:2: torch sees 2 CUDA devices.*cuda:1"):
        pick_device("cuda:2")


def test_one_device_for_several_processes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setenv("WORLD_SIZE", "4")
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    with pytest.raises(ValueError, match=r"cuda:0 is one device for 2 processes.*--device cuda,"):
        pick_device("cuda:0")
    assert pick_device("cuda") == torch.device("cuda")  # each process's own
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "1")
    assert pick_device("cuda:0") == torch.device("cuda", 0)


@pytest.mark.parametrize(
    "text",
    [
        "CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`",
        "cusolver error: CUSOLVER_STATUS_ALLOC_FAILED, when calling `cusolverDnCreate(handle)`",
        "cuDNN error: CUDNN_STATUS_ALLOC_FAILED",
    ],
)
def test_libraries_that_find_no_memory_for_themselves(text: str) -> None:
    assert out_of_memory(RuntimeError(text))
    assert not out_of_memory(RuntimeError(text.replace("ALLOC_FAILED", "INVALID_VALUE")))


@pytest.mark.slow
def test_what_was_saved_on_a_device_loads_without_it() -> None:
    """torch.load puts tensors back where they were unless it is told where to."""
    calls = [
        (file, node)
        for file in (ROOT / "moe_fair").rglob("*.py")
        for node in ast.walk(ast.parse(file.read_text()))
        if isinstance(node, ast.Call) and ast.unparse(node.func) == "torch.load"
    ]
    assert len(calls) == 2
    for file, node in calls:
        assert any(k.arg == "map_location" for k in node.keywords), (file, node.lineno)
