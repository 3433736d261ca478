"""Outputs that are not plain new folders, and two runs that want the same one."""

from __future__ import annotations

import json
import os
import stat
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from places import CALIBRATION, HELDOUT, MODEL
from processes import Python, python

from moe_fair.cli import main
from moe_fair.engines import shard_writer
from moe_fair.moe.checkpoint_source import Checkpoint

TEXT = ["-c", str(CALIBRATION), "--samples", "4", "--length", "32"]
# what was cut out of a plain new folder and what was not must be the same
RESULT = ("config.json", "model.safetensors", "moe_fair/plan.json", "moe_fair/manifest.json")


def runs(*arguments: object) -> None:
    with pytest.raises(SystemExit) as stop:
        main([str(a) for a in arguments])
    assert stop.value.code == 0


def mount(*arguments: object) -> None:
    """Mount, or skip the test with the reason."""
    command = ["mount", *map(str, arguments)]
    made = subprocess.run(command, capture_output=True, text=True)
    if made.returncode:
        pytest.skip(f"nothing can be mounted here: {made.stderr.strip()}")


@pytest.fixture
def volume(tmp_path: Path) -> Iterator[Path]:
    """An empty file system of 64 MB, as a container has its volume."""
    folder = tmp_path / "volume"
    folder.mkdir()
    mount("-t", "tmpfs", "-o", "size=64m", "none", folder)
    yield folder
    subprocess.run(["umount", "-l", str(folder)], check=True)


@pytest.fixture
def no_model(monkeypatch: pytest.MonkeyPatch) -> None:
    """Opening a model fails the test."""

    def init(*_: object, **__: object) -> None:
        raise AssertionError("a model was opened")

    monkeypatch.setattr(Checkpoint, "__init__", init)


@pytest.fixture
def cut(statistics_folder: Path) -> list[object]:
    """A `prune` of a second."""
    return [
        "prune", MODEL, "--stats", statistics_folder, "--experts", 40, "--repair", "none",
        "--rivals", "none", "-o",
    ]  # fmt: skip


@pytest.fixture
def plain(cut: list[object], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Its result in a plain new folder."""
    out = tmp_path_factory.mktemp("plain") / "out"
    runs(*cut, out)
    return out


def same(a: Path, b: Path) -> None:
    for name in RESULT:
        assert (a / name).read_bytes() == (b / name).read_bytes(), name
    assert sorted(p.name for p in a.iterdir()) == sorted(p.name for p in b.iterdir())


HOLD = """
import sys, time
from pathlib import Path
from moe_fair.core.output import claim
with claim(Path(sys.argv[1]), new=False):
    print("has it", flush=True)
    time.sleep(100)
"""


@pytest.mark.usefixtures("no_model")
@pytest.mark.parametrize(
    "command",
    [
        ["calibrate", MODEL, *TEXT, "--fresh"],
        ["prune", MODEL, "--experts", 40, *TEXT, "--fresh"],
        ["oracle", MODEL, *TEXT, "--fresh"],
        ["eval", MODEL, "--baseline", MODEL, "--agreement", "--heldout", HELDOUT],
        ["vision", "prune", "no.such:model", "--data", "digits", "--ratio", 0.5, "--fresh"],
        ["vision", "sparsify", "no.such:model", "--data", "digits", "--sparsity", 0.5],
    ],
    ids=lambda c: " ".join(c[:2]) if c[0] == "vision" else c[0],
)
def test_a_second_run_is_refused_at_once(
    fails: Callable[..., str], tmp_path: Path, command: list[object]
) -> None:
    """Before it reads or removes anything, whatever command it is."""
    out = tmp_path / "out"
    for kind in ("calibrating", "pruning", "partial"):
        (tmp_path / f"out.{kind}").mkdir()
        (tmp_path / f"out.{kind}" / "work").touch()
    run = [sys.executable, "-c", HOLD, str(out)]
    with subprocess.Popen(run, stdout=subprocess.PIPE, text=True) as other:
        assert other.stdout is not None
        assert other.stdout.readline() == "has it\n"
        said = fails(*command, "-o", out)
        assert f"out is being written by process {other.pid} on " in said
        assert "started 2" in said
        other.kill()
    left = sorted(str(p.relative_to(tmp_path)) for p in tmp_path.rglob("work"))
    assert left == ["out.calibrating/work", "out.partial/work", "out.pruning/work"]


@pytest.mark.slow
def test_two_runs_at_once(tmp_path: Path) -> None:
    """Started together with different seeds: one has all of its own, the other says who has it."""
    out = tmp_path / "out"
    command = ["-m", "moe_fair", "calibrate", MODEL, *TEXT, "-o", out, "--seed"]
    both = [Python([*command, seed], tmp_path / f"log{seed}") for seed in (1, 2)]
    codes = [p.wait(timeout=300) for p in both]
    logs = [(tmp_path / f"log{seed}").read_text() for seed in (1, 2)]
    assert sorted(codes) == [0, 2], logs
    won = codes.index(0)
    last = logs[1 - won].splitlines()[-1]
    assert "is being written by process" in last or "is not empty" in last
    assert f"seed: {won + 1}\n" in (out / "recipe.yaml").read_text()
    assert python(*command, won + 1, "-o", tmp_path / "again").returncode == 0
    name = "statistics.safetensors"
    assert (out / name).read_bytes() == (tmp_path / "again" / name).read_bytes()
    assert sorted(p.name for p in tmp_path.iterdir()) == ["again", "log1", "log2", "out"]


def test_a_lock_goes_when_a_run_fails(
    fails: Callable[..., str], cut: list[object], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fails("prune", MODEL, "--experts", 3, *TEXT, "-o", tmp_path / "a" / "b" / "out")
    assert list(tmp_path.iterdir()) == []
    monkeypatch.setattr(shard_writer, "_copy_some", lambda *_: 1 / 0)
    with pytest.raises(SystemExit, match="1"):
        main([str(a) for a in (*cut, tmp_path / "out")])
    assert [p.name for p in tmp_path.iterdir()] == ["out.partial"]


@pytest.mark.slow
def test_a_volume_is_worked_inside_of(
    fails: Callable[..., str], cut: list[object], plain: Path, volume: Path
) -> None:
    runs(*cut, volume)
    same(volume, plain)
    assert os.path.ismount(volume)
    assert [p.name for p in volume.parent.iterdir()] == ["volume"]
    assert "is not empty" in fails(*cut, volume)


@pytest.mark.slow
def test_a_part_of_the_same_disk_is_mounted(cut: list[object], plain: Path, tmp_path: Path) -> None:
    """`mount --bind`: the same device on both sides, and yet no name to give away."""
    folder, disk = tmp_path / "a volume", tmp_path / "disk"
    for path in (folder, disk):
        path.mkdir()
    mount("--bind", disk, folder)
    try:
        runs(*cut, folder)
    finally:
        subprocess.run(["umount", "-l", str(folder)], check=True)
    same(disk, plain)


@pytest.mark.slow
def test_a_folder_in_one_that_is_not_writable(
    fails: Callable[..., str], cut: list[object], plain: Path, volume: Path, tmp_path: Path
) -> None:
    for name in ("given", "full"):
        (volume / name).mkdir()
    subprocess.run(["mount", "-o", "remount,ro", str(volume)], check=True)
    said = fails("calibrate", MODEL, "-o", volume / "new" / "out")
    assert f"{volume} is not writable; write elsewhere" in said
    mount("-t", "tmpfs", "-o", "size=64m", "none", volume / "given")
    try:
        runs(*cut, volume / "given")
        same(volume / "given", plain)
    finally:
        subprocess.run(["umount", "-l", str(volume / "given")], check=True)


@pytest.mark.slow
def test_links_lead_to_where_the_result_lies(
    cut: list[object], plain: Path, tmp_path: Path
) -> None:
    (tmp_path / "disk" / "there").mkdir(parents=True)
    for name in ("there", "new"):
        (tmp_path / name).symlink_to(f"disk/{name}")
        runs(*cut, tmp_path / name)
        assert (tmp_path / name).is_symlink()
        same(tmp_path / "disk" / name, plain)
    assert sorted(p.name for p in (tmp_path / "disk").iterdir()) == ["new", "there"]
    assert sorted(p.name for p in tmp_path.iterdir()) == ["disk", "new", "there"]


def test_space_is_looked_for_where_it_is_used(
    fails: Callable[..., str], tmp_path: Path, volume: Path
) -> None:
    subprocess.run(["mount", "-o", "remount,size=5m", str(volume)], check=True)
    (tmp_path / "link").symlink_to(volume / "out")
    for out in (volume, tmp_path / "link"):
        said = fails("prune", MODEL, "--experts", 40, *TEXT, "-o", out)
        assert f"0.0 GB are free in {volume}" in said
        assert list(volume.iterdir()) == []


@pytest.mark.usefixtures("no_model")
@pytest.mark.parametrize("kind", ["partial", "calibrating"])
def test_what_is_in_the_way_is_met_before_anything_is_read(
    fails: Callable[..., str], tmp_path: Path, kind: str
) -> None:
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "chunk").touch()
    (tmp_path / f"out.{kind}").symlink_to("data")
    run = ["prune", MODEL, "--experts", 40, *TEXT, "--fresh", "-o", tmp_path / "out"]
    assert f"out.{kind} is a link and in the way" in fails(*run)
    (tmp_path / f"out.{kind}").unlink()
    (tmp_path / f"out.{kind}").touch()
    assert f"out.{kind} is a file and in the way" in fails(*run)
    assert (tmp_path / "data" / "chunk").exists()
    assert f"{tmp_path / 'data' / 'chunk'} is a file; give a path" in fails(
        *run[:-1], tmp_path / "data" / "chunk" / "out"
    )


def test_evaluations_have_a_place_before_they_run(
    fails: Callable[..., str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    opened: list[object] = []
    monkeypatch.setattr(Checkpoint, "__init__", lambda *a: opened.append(a))
    run = ["eval", MODEL, "--baseline", MODEL, "--agreement", "--heldout", HELDOUT, "-o"]
    (tmp_path / "file").touch()
    assert "file is a file" in fails(*run, tmp_path / "file")
    assert "file is a file; give a path" in fails(*run, tmp_path / "file" / "x")
    (tmp_path / "circle").symlink_to("circle")
    assert "lead in a circle" in fails(*run, tmp_path / "circle")
    assert opened == []


@pytest.mark.slow
def test_evaluations_go_where_a_link_leads(tmp_path: Path) -> None:
    (tmp_path / "out").symlink_to("disk/out")  # which is not there yet
    runs(
        "eval", MODEL, "--baseline", MODEL, "--agreement", "--heldout", HELDOUT,
        "--heldout-samples", 4, "--length", 32, "-o", tmp_path / "out",
    )  # fmt: skip
    assert [p.name for p in (tmp_path / "disk" / "out").iterdir()] == ["agreement.json"]
    assert [p.name for p in (tmp_path / "disk").iterdir()] == ["out"]


@pytest.fixture
def devices(tmp_path: Path) -> Iterator[list[Path]]:
    """A pipe that is read, and as root the device that /dev/null is."""
    pipe, null = tmp_path / "pipe", tmp_path / "null"
    os.mkfifo(pipe)
    reader = os.open(pipe, os.O_RDONLY | os.O_NONBLOCK)
    found = [pipe]
    try:
        os.mknod(null, stat.S_IFCHR | 0o666, os.makedev(1, 3))
        null.read_bytes()
        found.append(null)
    except OSError:  # only root may, and not on every disk
        null.unlink(missing_ok=True)
    yield found
    os.close(reader)


@pytest.mark.slow
def test_devices_are_written_into(
    fails: Callable[..., str], statistics_folder: Path, plain: Path, tmp_path: Path,
    devices: list[Path],
) -> None:  # fmt: skip
    plan = ["plan", statistics_folder, "--experts", 40, "-o"]
    for device in devices:
        mode = device.stat().st_mode
        runs(*plan, device)
        assert device.stat().st_mode == mode
    for device in devices[1:]:  # the page is more than a pipe holds
        runs("report", plain, "-o", device)
        assert stat.S_ISCHR(device.stat().st_mode)
    for device in devices:
        assert "pictures beside" in fails("report", plain, "--format", "md", "-o", device)
    (tmp_path / "disk").mkdir()
    (tmp_path / "link").symlink_to("disk/plan.json")
    runs(*plan, tmp_path / "link")
    assert (tmp_path / "link").is_symlink()
    assert json.loads((tmp_path / "disk" / "plan.json").read_text())["groups"]
    (tmp_path / "page").symlink_to("disk/report.md")
    runs("report", plain, "--format", "md", "-o", tmp_path / "page")
    assert sorted(p.name for p in (tmp_path / "disk").iterdir()) == [
        "plan.json", "report-figures", "report.md",
    ]  # fmt: skip


@pytest.mark.slow
@pytest.mark.nightly
@pytest.mark.parametrize("command", [["prune", "--ratio"], ["sparsify", "--sparsity"]])
def test_image_classifiers_in_a_volume(command: list[str], volume: Path) -> None:
    runs(
        "vision", *command, 0.5, "moe_fair.vision.zoo:ResNet(1, 10, 1, 4)", "--data", "digits",
        "--samples", 12, "--batch-size", 12, "-o", volume, "--json",
    )  # fmt: skip
    assert "pruned.json" in [p.name for p in volume.iterdir()]
    assert not list(volume.glob("moe_fair.*"))
    assert [p.name for p in volume.parent.iterdir()] == ["volume"]
