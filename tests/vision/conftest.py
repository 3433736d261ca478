"""A folder of small pictures: three classes of coloured noise."""

from __future__ import annotations

import subprocess
from pathlib import Path

import numpy as np
import pytest

from moe_fair.vision import reload

CLASSES = ("blue", "green", "red")


@pytest.fixture(autouse=True)
def _reload_here(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Results are built anew in this process but in the tests of that, and of the command."""
    if request.module.__name__.endswith("test_reload") or request.node.name == "test_the_command":
        return

    def here(arguments: list[str]) -> subprocess.CompletedProcess[str]:
        reload.main(*arguments)
        return subprocess.CompletedProcess(arguments, 0, "", "")

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
