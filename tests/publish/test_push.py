"""`moe-fair push` by the real client, against a loopback server that speaks the Hub's protocol."""

from __future__ import annotations

import os
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from unittest import mock

import pytest
import torch
from hub import READS, WRITES, Hub, serving
from places import MODEL

import moe_fair
from moe_fair.engines.shards import write_shards
from moe_fair.moe import checkpoint
from moe_fair.moe.load import Checkpoint
from moe_fair.publish.card import read_metadata

NAME = "tester/pruned"
BASE = "someone/base"
LOAD = """
import sys, torch
from transformers import AutoModelForCausalLM
model = AutoModelForCausalLM.from_pretrained(sys.argv[1], revision=sys.argv[3] or None,
    dtype=torch.float32, trust_remote_code=sys.argv[4] == "unequal")
torch.save(model(torch.arange(3, 35).view(2, 16)).logits, sys.argv[2])
"""


@pytest.fixture(scope="module", params=["unequal", "uniform"])
def kind(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture(scope="module")
def pruned(
    tmp_path_factory: pytest.TempPathFactory, kind: str, statistics_folder: Path
) -> Path:
    """The reference model with 40 experts a layer, in several shards as large models are."""
    folder = tmp_path_factory.mktemp("pruned") / "out"
    statistics = moe_fair.Statistics.load(statistics_folder)
    allocate = "uniform" if kind == "uniform" else "tod"
    sharded = partial(write_shards, max_shard_bytes=2_000_000)
    with mock.patch.object(checkpoint, "write_shards", sharded):
        moe_fair.prune(
            str(MODEL), folder, statistics=statistics, experts=40, allocate=allocate
        )
    return folder


@pytest.fixture
def out(pruned: Path, tmp_path: Path) -> Path:
    """A copy that a test may write into."""
    return Path(shutil.copytree(pruned, tmp_path / "out"))


@pytest.fixture
def hub() -> Iterator[Hub]:
    """A Hub that has the base model's card, and nothing to say that it does not know."""
    found = Hub()
    card = b"---\nlicense: other\nlicense_name: tongyi\nlanguage: [en]\n---\n# Base\n"
    found.add(BASE, {"README.md": card})
    with serving(found):
        yield found
    assert found.unknown == []


def environment(hub: Hub, home: Path, token: str | None = WRITES) -> dict[str, str]:
    mine = {k: v for k, v in os.environ.items() if not k.startswith(("HF_", "HUGGING"))}
    mine |= {
        "HF_ENDPOINT": hub.url, "HF_HUB_DISABLE_XET": "1", "HF_HOME": str(home),
        "HF_HUB_DISABLE_TELEMETRY": "1", "OMP_NUM_THREADS": "2",
    }  # fmt: skip
    return mine | ({"HF_TOKEN": token} if token else {})


def push(
    hub: Hub, out: Path, *more: str, token: str | None = WRITES
) -> subprocess.CompletedProcess[str]:
    """Run the command as a user does, to its end."""
    return subprocess.run(
        [sys.executable, "-m", "moe_fair", "push", str(out), NAME, *more],
        capture_output=True, text=True, env=environment(hub, out.parent / "home", token),
        timeout=120,
    )  # fmt: skip


def logits(hub: Hub, home: Path, name: str, kind: str, revision: str = "") -> torch.Tensor:
    """What a user gets who knows nothing but the name."""
    subprocess.run(
        [sys.executable, "-c", LOAD, name, str(home / "logits"), revision, kind],
        check=True, capture_output=True, env=environment(hub, home / "home"), cwd=home,
    )  # fmt: skip
    return torch.load(home / "logits")


@pytest.mark.slow
def test_what_is_pushed_loads_by_its_name(hub: Hub, out: Path, kind: str, tmp_path: Path) -> None:
    done = push(hub, out, "--base-model", BASE)
    assert done.returncode == 0, done.stderr
    assert f"{hub.url}/{NAME}/commit/" in done.stdout
    assert WRITES not in done.stdout + done.stderr
    files = hub.repositories[NAME].branches["main"]
    local = {p.relative_to(out).as_posix(): p for p in out.rglob("*") if p.is_file()}
    assert files == {name: path.read_bytes() for name, path in local.items()}
    assert sum(n.endswith(".safetensors") for n in files) > 4
    assert ("modeling_moe_fair.py" in files) == (kind == "unequal")
    assert not hub.repositories[NAME].private
    assert len(hub.repositories[NAME].commits) == 1
    assert ("POST", "/api/validate-yaml") in hub.requests

    found = logits(hub, tmp_path, NAME, kind)
    with torch.no_grad():
        wanted = Checkpoint(str(out)).load("float32")(torch.arange(3, 35).view(2, 16)).logits
    assert torch.equal(found, wanted)

    again = push(hub, out, "--base-model", BASE)
    assert again.returncode == 0, again.stderr
    assert len(hub.repositories[NAME].commits) == 1
    assert set(hub.arrived.values()) == {1}


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["unequal"], indirect=True)
@pytest.mark.parametrize("end", ["killed", "network"])
def test_interrupted_in_the_middle(hub: Hub, out: Path, kind: str, end: str, tmp_path: Path) -> None:
    """The process dies, or the network does; the same command finishes with the rest."""
    large = [p for p in out.rglob("*.safetensors")]
    hub.stall = lambda there: there >= 2
    command = [sys.executable, "-m", "moe_fair", "push", str(out), NAME]
    process = subprocess.Popen(command, env=environment(hub, tmp_path / "home"))
    assert hub.stalled.wait(60)
    arrived = set(hub.objects)
    assert 2 <= len(arrived) < len(large)
    process.send_signal(signal.SIGKILL if end == "killed" else signal.SIGINT)
    assert process.wait(60) != 0
    assert hub.repositories[NAME].branches["main"] == {}  # never half a model

    hub.stall = lambda _: False
    before = len(hub.requests)
    done = push(hub, out)
    assert done.returncode == 0, done.stderr
    sent = {path for method, path in hub.requests[before:] if path.startswith("/lfs/")}
    assert len(sent) == len(large) - len(arrived)
    assert not any(digest in path for path in sent for digest in arrived)
    assert set(hub.arrived.values()) == {1}
    files = hub.repositories[NAME].branches["main"]
    assert all(files[p.relative_to(out).as_posix()] == p.read_bytes() for p in large)
