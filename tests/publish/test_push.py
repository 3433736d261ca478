"""`moe-fair push` by the real client, against a loopback server that speaks the Hub's protocol."""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from unittest import mock

import pytest
import torch
from hub import READS, WRITES, Hub, serving
from places import MODEL
from processes import Python, python

import moe_fair
from moe_fair.engines.shard_writer import write_shards
from moe_fair.moe import checkpoint_writer as checkpoint
from moe_fair.moe.checkpoint_source import Checkpoint
from moe_fair.publish import push as publish
from moe_fair.publish.card import read_metadata
from moe_fair.report.write import write_report

NAME = "tester/pruned"
BASE = "someone/base"
LOAD = """
import sys, torch
from transformers import AutoModelForCausalLM
torch.set_num_threads(int(sys.argv[5]))
model = AutoModelForCausalLM.from_pretrained(sys.argv[1], revision=sys.argv[3] or None,
    dtype=torch.float32, trust_remote_code=sys.argv[4] == "unequal")
torch.save(model(torch.arange(3, 35).view(2, 16)).logits, sys.argv[2])
"""


@pytest.fixture(scope="module", params=["unequal", "uniform"])
def kind(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture(scope="module")
def pruned(tmp_path_factory: pytest.TempPathFactory, kind: str, statistics_folder: Path) -> Path:
    """The reference model with 40 experts a layer, in several shards as large models are."""
    folder = tmp_path_factory.mktemp("pruned") / "out"
    statistics = moe_fair.Statistics.load(statistics_folder)
    allocate = "uniform" if kind == "uniform" else "tod"
    sharded = partial(write_shards, max_shard_bytes=2_000_000)
    with mock.patch.object(checkpoint, "write_shards", sharded):
        moe_fair.prune(
            str(MODEL), folder, statistics=statistics, experts=40, allocate=allocate, repair="none"
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
    home = environment(hub, out.parent / "home", token)
    return python("-m", "moe_fair", "push", out, NAME, *more, env=home, timeout=120)


def logits(hub: Hub, home: Path, name: str, kind: str, revision: str = "") -> torch.Tensor:
    """What a user gets who knows nothing but the name."""
    # another number of threads adds up in another order
    given = [name, home / "logits", revision, kind, torch.get_num_threads()]
    done = python("-c", LOAD, *given, env=environment(hub, home / "home"), cwd=home)
    assert done.returncode == 0, done.stderr[-2000:]
    return torch.load(home / "logits")


@pytest.mark.slow
@pytest.mark.parametrize(
    "kind",
    ["unequal", pytest.param("uniform", marks=pytest.mark.nightly)],
    indirect=True,
)
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


SECRETS = (".env", ".ssh/id_ed25519", ".git/config", "notes.bak", "moe_fair/lm-eval/results.json")


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["unequal"], indirect=True)
def test_only_what_is_named_goes_up(
    out: Path, kind: str, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    """What lies there beside it stays, and is listed; so does what a link leads to."""
    whole = {p.relative_to(out).as_posix() for p in out.rglob("*") if p.is_file()}
    for name in SECRETS:
        (out / name).parent.mkdir(exist_ok=True, parents=True)
        (out / name).write_text("secret")
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere" / "key").write_text("secret")
    (out / "linked").symlink_to(tmp_path / "elsewhere" / "key")
    (out / "folder").symlink_to(tmp_path / "elsewhere")
    (out / "moe_fair" / "agreement.json").symlink_to(tmp_path / "elsewhere" / "key")
    with pytest.raises(ValueError, match="agreement"):
        publish.push(out, NAME, dry_run=True)
    (out / "moe_fair" / "agreement.json").unlink()
    with pytest.raises(ValueError, match="folder is a link"):
        publish.push(out, NAME, dry_run=True)
    (out / "folder").unlink()
    said: list[str] = []
    made = publish.push(out, NAME, dry_run=True, say=said.append)
    assert set(made.files) == whole | {"README.md"}
    left = (".env", ".git/", ".ssh/", "linked", "notes.bak", "moe_fair/lm-eval/results.json")
    assert sorted(made.left_out) == sorted(left)
    assert any("left out" in line and ".ssh/" in line and "linked" in line for line in said)
    (out / "moe_fair" / "report.html").write_text("<script>steal()</script>")
    write_report(out, "md")
    assert any(n.endswith(".png") for n in publish.push(out, NAME, dry_run=True).files)
    assert "steal" not in (out / "moe_fair" / "report.html").read_text()  # drawn anew


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["uniform"], indirect=True)
@pytest.mark.parametrize("name", ["tokenizer.json", "moe_fair", "README.md"])
def test_links_are_refused(out: Path, kind: str, name: str, tmp_path: Path) -> None:
    """Even with the bytes that the manifest lists."""
    if name == "README.md":
        (out / name).write_text("mine")
    (out / name).rename(tmp_path / "moved")
    (out / name).symlink_to(tmp_path / "moved")
    with pytest.raises(ValueError, match=f"{name} is a link"):
        publish.push(out, NAME, dry_run=True)


def interrupted(hub: Hub, out: Path, how: str) -> str:
    """Push until the server breaks; kill the client, or see what it says."""
    hub.breaks = how
    log = out.parent / "log"
    home = environment(hub, out.parent / "home")
    process = Python(["-m", "moe_fair", "push", out, NAME], log, env=home)
    try:
        assert hub.broke.wait(60)
        if how == "drop":
            assert process.wait(200) == 2
    finally:
        process.kill()
        process.wait()
    hub.breaks = ""
    return log.read_text()


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["unequal"], indirect=True)
@pytest.mark.parametrize("how", ["hang", pytest.param("drop", marks=pytest.mark.nightly)])
def test_interrupted_in_the_middle(hub: Hub, out: Path, kind: str, how: str) -> None:
    """The process is killed, or the network fails; the same command finishes with the rest."""
    large = {p.relative_to(out).as_posix(): p for p in out.rglob("*.safetensors")}
    said = interrupted(hub, out, how)
    assert how == "hang" or "run the same command again" in said.splitlines()[-1]
    assert "Traceback" not in said
    assert WRITES not in said
    arrived = set(hub.objects)
    assert 2 <= len(arrived) < len(large)
    assert hub.repositories[NAME].branches["main"] == {}  # never half a model

    before = len(hub.requests)
    done = push(hub, out)
    assert done.returncode == 0, done.stderr
    sent = {path for method, path in hub.requests[before:] if path.startswith("/lfs/")}
    assert len(sent) == len(large) - len(arrived)
    assert not any(digest in path for path in sent for digest in arrived)
    assert set(hub.arrived.values()) == {1}
    files = hub.repositories[NAME].branches["main"]
    assert {n: files[n] for n in large} == {n: p.read_bytes() for n, p in large.items()}


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["unequal"], indirect=True)
@pytest.mark.nightly
def test_private_on_a_branch_in_parts(hub: Hub, out: Path, kind: str, tmp_path: Path) -> None:
    hub.part = 700_000
    done = push(hub, out, "--private", "--revision", "forty")
    assert done.returncode == 0, done.stderr
    repository = hub.repositories[NAME]
    assert repository.private
    assert set(repository.branches) == {"main", "forty"}
    assert repository.branches["main"] == {}
    assert [c["branch"] for c in repository.commits] == ["forty"]
    assert any(path.endswith("/2") for _, path in hub.requests if path.startswith("/lfs/"))
    found = logits(hub, tmp_path, NAME, kind, "forty")
    with torch.no_grad():
        wanted = Checkpoint(str(out)).load("float32")(torch.arange(3, 35).view(2, 16)).logits
    assert torch.equal(found, wanted)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["uniform"], indirect=True)
@pytest.mark.parametrize(
    ("token", "said"),
    [(None, "no Hub token: log in with"), (READS, "HTTP 403"), ("hf_" + "x" * 34, "HTTP 401")],
)
def test_tokens(hub: Hub, out: Path, kind: str, token: str | None, said: str) -> None:
    done = push(hub, out, token=token)
    assert done.returncode == 2
    assert said in done.stderr
    assert "hf auth login" in done.stderr
    assert "Traceback" not in done.stderr
    assert not token or token not in done.stdout + done.stderr
    assert set(hub.repositories) == {BASE}
    assert not hub.objects


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["uniform"], indirect=True)
def test_the_licence_is_the_base_models(hub: Hub, out: Path, kind: str) -> None:
    """A dry run reads the base model's card, writes nothing on the Hub, and needs no token."""
    done = push(hub, out, "--base-model", BASE, "--dry-run", token=None)
    assert done.returncode == 0, done.stderr
    found = read_metadata(out / "README.md")
    assert found["license"] == "other"
    assert found["license_name"] == "tongyi"
    assert found["language"] == ["en"]
    assert found["base_model"] == BASE
    assert "has no licence line" not in done.stderr
    assert set(hub.repositories) == {BASE}
    assert {method for method, _ in hub.requests} <= {"GET", "HEAD"}
    assert "model-00001-of-" in done.stdout
    assert "README.md" in done.stdout
