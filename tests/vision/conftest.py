"""A folder of small pictures: three classes of coloured noise."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
from processes import python

from moe_fair.vision import afresh, reload

STARTED = "test_models_whose_states_are_peculiar[versioned]"
Ended = Callable[[], subprocess.CompletedProcess[str]]
CLASSES = ("blue", "green", "red")


@pytest.fixture(autouse=True)
def _reload_here(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Results are built anew in this process; in the tests of that by one that is forked from what
    has torch; by one that is started in a single test. In that of the command nothing stands in."""
    if request.node.name in (
        "test_models_whose_states_are_peculiar[versioned]",
        "test_the_command",
    ):
        return
    if request.module.__name__.endswith("test_reload"):

        @contextmanager
        def forked(arguments: list[str]) -> Iterator[Ended]:
            path = os.pathsep.join(p or os.getcwd() for p in sys.path)
            env = {**os.environ, "PYTHONPATH": path}
            yield lambda: python("-m", "moe_fair.vision.afresh", *arguments, env=env)

        monkeypatch.setattr(reload, "_elsewhere", forked)
        return

    @contextmanager
    def here(arguments: list[str]) -> Iterator[Ended]:
        def ended() -> subprocess.CompletedProcess[str]:
            afresh.main(*arguments)
            return subprocess.CompletedProcess(arguments, 0, "", "")

        yield ended

    monkeypatch.setattr(reload, "_elsewhere", here)


@pytest.fixture(scope="session")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """DIR/train/CLASS/*.png (8 each) and DIR/test/CLASS/*.png (4 each), 12 × 12 pixels."""
    from PIL import Image

    folder = tmp_path_factory.mktemp("pictures")
    rng = np.random.default_rng(0)
    for part, count in (("train", 8), ("test", 4)):
        for channel, name in zip((2, 1, 0), CLASSES, strict=True):
            (folder / part / name).mkdir(parents=True)
            for i in range(count):
                pixels = rng.integers(0, 120, (12, 12, 3), dtype=np.uint8)
                pixels[:, :, channel] += 120
                Image.fromarray(pixels).save(folder / part / name / f"{i}.png")
    return folder
