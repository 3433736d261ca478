"""What is fetched of a published repository: weights of its root once, every small file."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from processes import python
from publish.hub import Hub, serving
from published.layouts import LAYOUTS
from published.make import lay_out

FETCH = """
import sys
from moe_fair.moe.checkpoint_source import Checkpoint
source = Checkpoint("openai/gpt-oss-20b")
small = {p.relative_to(source.home).as_posix() for p in source.home.rglob("*") if p.is_file()}
source.shards
every = {p.relative_to(source.home).as_posix() for p in source.home.rglob("*") if p.is_file()}
print("|".join(sorted(small)))
print("|".join(sorted(every - small)))
"""


@pytest.mark.slow
@pytest.mark.nightly
def test_weights_of_the_root_once_and_every_small_file(tmp_path: Path) -> None:
    layout = next(x for x in LAYOUTS if "gpt-oss" in x.name)
    folder = lay_out(layout, tmp_path / "checkpoint")
    files = {
        p.relative_to(folder).as_posix(): p.read_bytes() for p in folder.rglob("*") if p.is_file()
    }
    hub = Hub()
    hub.add("openai/gpt-oss-20b", files)
    with serving(hub):
        settings = {
            **os.environ, "HF_ENDPOINT": hub.url, "HF_HOME": str(tmp_path / "hf"),
            "HF_HUB_OFFLINE": "0", "HF_HUB_DISABLE_XET": "1",
        }  # fmt: skip
        done = python("-c", FETCH, env=settings)
    assert done.returncode == 0, done.stderr[-2000:]
    small, weights = (set(line.split("|")) for line in done.stdout.splitlines()[-2:])
    assert weights == {n for n in files if n.startswith("model-") and n.endswith(".safetensors")}
    copies = {n for n in files if n.startswith(("original/", "metal/"))}
    assert small == set(files) - weights - copies
