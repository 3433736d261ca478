"""Shared by all tests: few threads, no network, a calibration run, a command that must fail."""

from __future__ import annotations

import gc
import os
import signal
from collections.abc import Callable
from pathlib import Path

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"
# ignored in the background of a script, by every child as well; tests send it and await an answer
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)

import pytest
import torch
from places import CALIBRATION, MODEL

from moe_fair.report import figures

SMALL_PICTURES = 75  # dots an inch


def pytest_configure() -> None:
    """Nothing is searched for garbage until all is imported: half a million objects that stay."""
    gc.disable()


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """GPU tests say why they do not run; nightly ones are left out unless `-m` speaks of them."""
    if not torch.cuda.is_available():
        for item in items:
            if item.get_closest_marker("gpu"):  # keywords hold names of folders too
                item.add_marker(
                    pytest.mark.skip(reason="needs a CUDA device; torch sees none here")
                )
    if "nightly" not in config.option.markexpr and not any("::" in a for a in config.args):
        left_out = [i for i in items if i.get_closest_marker("nightly")]
        if left_out:
            config.hook.pytest_deselected(items=left_out)  # pytest's last line counts them
            items[:] = [i for i in items if not i.get_closest_marker("nightly")]
    if processes := int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", 0)):
        items[:] = _slow_first(items, processes)


def pytest_collection_finish() -> None:
    """What was imported is passed over from here on. To search after every 700 objects, as Python
    does by itself, takes a twentieth of the tests' time."""
    gc.freeze()
    gc.set_threshold(10_000, 10, 20)
    gc.enable()


def _slow_first(items: list[pytest.Item], processes: int) -> list[pytest.Item]:
    """An equal share for each process, whole files, those with slow tests first in each.

    `--dist worksteal` cuts the list into such shares, and takes from their ends: long tests that
    are left to the end would be waited for.
    """
    files: dict[Path, list[pytest.Item]] = {}
    for item in items:
        files.setdefault(item.path, []).append(item)
    shares: list[list[pytest.Item]] = [[] for _ in range(processes)]
    for file in sorted(files.values(), key=lambda f: not any(map(_is_slow, f))):
        min(shares, key=len).extend(file)
    return [item for share in shares for item in share]


def _is_slow(item: pytest.Item) -> bool:
    return item.get_closest_marker("slow") is not None


@pytest.fixture(scope="session", autouse=True)
def _few_threads() -> None:
    # beside other workers one each: threads that wait for one another make such runs crawl
    if "OMP_NUM_THREADS" not in os.environ:
        torch.set_num_threads(1 if "PYTEST_XDIST_WORKER" in os.environ else 2)


@pytest.fixture(scope="session", autouse=True)
def _small_pictures() -> None:
    """Every run draws its report: half of that time goes into pixels, which few tests look at."""
    figures.DPI = SMALL_PICTURES


@pytest.fixture(scope="session", autouse=True)
def _own_caches(tmp_path_factory: pytest.TempPathFactory) -> None:
    """Remote code that a checkpoint brings is cached by transformers: not in the user's home."""
    os.environ["HF_HOME"] = str(tmp_path_factory.mktemp("hf"))
    os.environ["HF_MODULES_CACHE"] = str(tmp_path_factory.mktemp("hf-modules"))


@pytest.fixture(scope="session")
def settings() -> dict[str, object]:
    """A calibration run of a second."""
    return {"calibration": str(CALIBRATION), "samples": 8, "length": 64, "batch_size": 4}


@pytest.fixture(scope="session")
def statistics_folder(
    tmp_path_factory: pytest.TempPathFactory, settings: dict[str, object]
) -> Path:
    """Statistics of the reference model."""
    import moe_fair

    folder = tmp_path_factory.mktemp("calibrated") / "stats"
    moe_fair.calibrate(str(MODEL), folder, **settings)
    return folder


@pytest.fixture
def fails(capsys: pytest.CaptureFixture[str]) -> Callable[..., str]:
    """Run the command; assert exit code 2 and one line; return that line."""

    from moe_fair.cli import main

    def run(*arguments: object) -> str:
        with pytest.raises(SystemExit) as stop:
            main([str(a) for a in arguments])
        lines = capsys.readouterr().err.strip().splitlines()
        assert stop.value.code == 2, lines
        assert lines[-1].startswith("moe-fair: error: "), lines
        assert len([x for x in lines if x.startswith("moe-fair")]) == 1
        assert not any("Traceback" in x for x in lines)
        return lines[-1]

    return run
