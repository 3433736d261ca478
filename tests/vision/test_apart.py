"""The process that is set apart builds a result from its files, and knows nothing else of it."""

from __future__ import annotations

import multiprocessing
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from importlib import import_module
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from vision.conftest import Ended

from moe_fair.vision import apart as processes
from moe_fair.vision import reload
from moe_fair.vision.apart import set_apart
from moe_fair.vision.checkpoint import save_pruned
from moe_fair.vision.reload import checked_afresh
from moe_fair.vision.source import open_source

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="processes are forked on Linux")
NET = """
from torch import nn

class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = nn.Conv2d(3, 4, 3)

    def forward(self, x):
        return self.layer(x).mean((2, 3))
"""
HOLDER = """
import multiprocessing, time
from moe_fair.vision.apart import set_apart

with set_apart("net_of_mine:Net"):
    print(multiprocessing.active_children()[0].pid, flush=True)
    time.sleep(600)
"""


@pytest.fixture
def started(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The folders for which a process was started, which only says that it failed."""
    asked: list[str] = []

    @contextmanager
    def fails(arguments: list[str]) -> Iterator[Ended]:
        asked.append(arguments[0])
        yield lambda: subprocess.CompletedProcess(arguments, 1, "", "started")

    monkeypatch.setattr(reload, "_elsewhere", fails)
    return asked


def saved(module: str, folder: Path) -> tuple[nn.Module, Tensor]:
    torch.manual_seed(0)
    source = open_source(f"{module}:Net", image_size=8)
    save_pruned(source.model, source, (), folder)
    return source.model, torch.rand(2, 3, 8, 8)


def written(name: str, folder: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    (folder / f"{name}.py").write_text(NET)
    monkeypatch.syspath_prepend(folder)
    return name


def test_it_builds_the_result(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, started: list[str]
) -> None:
    module = written("net_of_one", tmp_path, monkeypatch)
    with set_apart(f"{module}:Net") as apart:
        model, images = saved(module, tmp_path)
        with checked_afresh(tmp_path, model, images, apart):
            pass
        assert len(multiprocessing.active_children()) == 1
    assert not started
    assert not multiprocessing.active_children()


@pytest.mark.parametrize("how", ["code that is changed here", "no weights", "it hangs"])
def test_what_it_does_not_build_another_decides(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, started: list[str], how: str
) -> None:
    module = written(f"net_of_{len(how)}", tmp_path, monkeypatch)
    with set_apart(f"{module}:Net") as apart:
        model, images = saved(module, tmp_path)
        if how == "no weights":
            (tmp_path / "model.safetensors").unlink()
        elif how == "it hangs":
            (child,) = multiprocessing.active_children()
            assert child.pid is not None
            os.kill(child.pid, signal.SIGSTOP)
            monkeypatch.setattr(processes, "LONGEST", 0.1)
        else:
            kind = import_module(module).Net
            monkeypatch.setattr(kind, "forward", lambda net, x: 1 + net.layer(x).mean((2, 3)))
        with (
            pytest.raises(
                RuntimeError, match=r"cannot be built in a process of its own.*: started"
            ),
            checked_afresh(tmp_path, model, images, apart),
        ):
            pass
    assert started == [str(tmp_path)]


@pytest.mark.slow
def test_it_ends_with_the_process_that_set_it_apart() -> None:
    path = os.pathsep.join(p or os.getcwd() for p in sys.path)
    with subprocess.Popen(
        [sys.executable, "-c", HOLDER],
        env={**os.environ, "PYTHONPATH": path},
        stdout=subprocess.PIPE,
        text=True,
    ) as holder:
        assert holder.stdout is not None
        apart = int(holder.stdout.readline())
        os.kill(apart, signal.SIGINT)  # as the terminal sends to both
        time.sleep(0.5)
        assert running(apart)
        holder.kill()
    deadline = time.monotonic() + 60
    while running(apart) and time.monotonic() < deadline:
        time.sleep(0.1)
    assert not running(apart)


def running(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False
