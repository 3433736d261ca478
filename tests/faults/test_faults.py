"""Faults, injected for real: each ends in one clear line, and the same command then goes on.

Kills are in `test_killed_runs.py`, lost processes in `test_several_processes.py`, hostile names in
`report/test_report.py`, a network that drops in `publish/test_push.py`.
"""

from __future__ import annotations

import errno
import json
import os
import pickle
import shutil
import struct
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from places import CALIBRATION, MODEL
from processes import limited
from safetensors.torch import load_file, save_file

import moe_fair
from moe_fair.cli import main
from moe_fair.core.output import find_place
from moe_fair.engines import shard_writer
from moe_fair.engines.shards import INDEX, shard_files, stored_tensors
from moe_fair.moe.checkpoint_source import Checkpoint
from moe_fair.pipelines.disk import check_room
from moe_fair.pipelines.verify import verify

TEXT = ["-c", str(CALIBRATION), "--samples", "4", "--length", "32"]


@pytest.fixture
def model(tmp_path: Path) -> Path:
    return Path(shutil.copytree(MODEL, tmp_path / "model"))


@pytest.fixture
def plan_file(statistics_folder: Path, tmp_path: Path) -> Path:
    statistics = moe_fair.Statistics.load(statistics_folder)
    moe_fair.plan(statistics, experts=40).save(tmp_path / "plan.json")
    return tmp_path / "plan.json"


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 12.5 MB: room for the result when it is asked, none for all of it."""
    folder = tmp_path / "small"
    folder.mkdir()
    made = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=12500k", "none", str(folder)],
        capture_output=True, text=True,
    )  # fmt: skip
    if made.returncode:
        pytest.skip(f"a small file system cannot be mounted here: {made.stderr.strip()}")
    yield folder
    subprocess.run(["umount", "-l", str(folder)], check=True)


@pytest.mark.slow
def test_a_disk_that_fills_while_the_result_is_written(
    fails: Callable[..., str], statistics_folder: Path, small_disk: Path, tmp_path: Path
) -> None:
    out = small_disk / "out"
    run = ["prune", MODEL, "--stats", statistics_folder, "--experts", 40, "--repair", "none"]
    said = fails(*run, "-o", out)
    assert "No space left on device" in said
    assert not out.exists()
    subprocess.run(["mount", "-o", "remount,size=64m", str(small_disk)], check=True)
    for folder in (out, tmp_path / "elsewhere"):
        with pytest.raises(SystemExit, match="0"):
            main([str(a) for a in (*run, "-o", folder)])
    assert sorted(p.name for p in small_disk.iterdir()) == ["out"]
    for name in ("model.safetensors", "moe_fair/manifest.json"):
        assert (out / name).read_bytes() == (tmp_path / "elsewhere" / name).read_bytes()


def test_room_is_asked_for_what_lies_beside_the_result(
    fails: Callable[..., str], statistics_folder: Path, small_disk: Path
) -> None:
    """Repaired layers wait for the cut; those that a killed run has left need no more room."""
    out = small_disk / "out"
    run = ["prune", MODEL, "--stats", statistics_folder, "--experts", 40, *TEXT]
    assert "make room or write elsewhere" in fails(*run, "-o", out)
    assert list(small_disk.iterdir()) == []
    place = find_place(out)
    work = place.beside("calibrating")
    with pytest.raises(ValueError, match="make room"):
        check_room({"result": 7_000_000, "meanwhile": 7_000_000}, out, place, work)
    (work / "repair").mkdir(parents=True)
    (work / "repair" / "layer-00000.safetensors").write_bytes(bytes(6_000_000))
    needs = {"result": 6_000_000, "meanwhile": 6_000_000}
    assert "0.01 GB beside it" in check_room(needs, out, place, work)


@pytest.mark.slow
@pytest.mark.nightly
def test_a_disk_that_is_full_while_statistics_are_saved(
    fails: Callable[..., str], small_disk: Path
) -> None:
    with (small_disk / "ballast").open("wb") as f:
        f.write(bytes(12_000_000))
    run = ["calibrate", MODEL, *TEXT, "-o", small_disk / "stats"]
    assert "No space left on device" in fails(*run)
    assert not (small_disk / "stats").exists()
    (small_disk / "ballast").unlink()
    with pytest.raises(SystemExit, match="0"):
        main([str(a) for a in run])
    assert sorted(p.name for p in small_disk.iterdir()) == ["stats"]


@pytest.mark.slow
def test_too_little_memory(tmp_path: Path) -> None:
    """The limit of `ulimit -v`, so near to what the imports take that nothing smaller helps."""
    run = [
        "calibrate", MODEL, "-c", CALIBRATION, "--samples", "4", "--length", "1024",
        "--batch-size", "4", "-o", tmp_path / "stats",
    ]  # fmt: skip
    kept = {k: v for k, v in os.environ.items() if not k.startswith("MALLOC_")}
    done = limited(40, *run, env=kept)  # freed memory is given back, as users have it
    assert done.returncode == 2, done.stderr
    assert "Traceback" not in done.stderr
    assert "moe-fair: error: out of memory" in done.stderr.splitlines()[-1]
    assert not (tmp_path / "stats").exists()


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_activations_that_are_not_finite(
    fails: Callable[..., str], model: Path, tmp_path: Path, bad: float
) -> None:
    """One weight of one expert is bad: what it gives would be scored."""
    tensors = load_file(model / "model.safetensors")
    tensors["model.layers.3.mlp.experts.7.down_proj.weight"][2, 3] = bad
    save_file(tensors, model / "model.safetensors", {"format": "pt"})
    said = fails("prune", model, "--experts", 40, *TEXT, "-o", tmp_path / "out")
    assert "NaN or Inf" in said
    assert not (tmp_path / "out").exists()


def entry(**change: object) -> dict[str, object]:
    return {"a": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]} | change}


TWICE = '{"a":{"dtype":"F32","shape":[2],"data_offsets":[0,8]},' * 2 + '"b":0}'
OVERLAP = entry() | {"b": {"dtype": "F32", "shape": [2], "data_offsets": [4, 12]}}


@pytest.mark.parametrize(
    ("header", "said"),
    [
        (entry(data_offsets=[0, 80]), "which does not take 80 bytes"),
        (entry(shape=[20], data_offsets=[0, 80]), "bytes are missing at its end"),
        (entry(data_offsets=[8, 0]), "offsets 8..0"),
        (entry(data_offsets=[-8, 0]), "offsets -8..0"),
        (entry(data_offsets=[0, 8.0]), "not whole numbers"),
        (entry(data_offsets=[0]), "header cannot be read"),
        (entry(shape=[3]), "F32 [3], which does not take 8 bytes"),
        (entry(shape=[-1, -2]), "shape [-1, -2]"),
        (entry(shape=[True, 2]), "not whole numbers"),
        (entry(shape="2"), "not whole numbers"),
        (entry(shape=[10**30]), "does not take 8 bytes"),
        (entry(dtype=7), "data type 7"),
        (OVERLAP, "a and b share bytes"),
        ({"a": None}, "header cannot be read"),
        ([1], "header cannot be read"),
        (b'{"a":' * 2 + TWICE[5:].encode(), "header cannot be read"),
        (b'{"a":1,"a":2}', "'a' occurs twice"),
        (b"[" * 200_000, "header cannot be read"),
        (b"\xff\xfe", "header cannot be read"),
    ],
)  # fmt: skip
def test_headers_that_lie(tmp_path: Path, header: object, said: str) -> None:
    file = tmp_path / "model.safetensors"
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    file.write_bytes(struct.pack("<Q", len(text)) + text + bytes(12))
    with pytest.raises(ValueError) as found:
        stored_tensors(file)
    assert said in str(found.value)
    assert len(str(found.value)) < 500


def test_a_header_longer_than_the_file(tmp_path: Path) -> None:
    file = tmp_path / "model.safetensors"
    for length in (2**63, 2**64 - 1, 100):
        file.write_bytes(struct.pack("<Q", length) + b"{}")
        with pytest.raises(ValueError, match="not a whole safetensors file"):
            stored_tensors(file)


@pytest.mark.parametrize(
    "name",
    ["../model.safetensors", "/etc/passwd", "a/../../x", "..", "", ".", "a\0b", "x" * 300, 5, None],
)
def test_an_index_that_points_elsewhere(tmp_path: Path, name: object) -> None:
    folder = tmp_path / "model"
    folder.mkdir()
    save_file({"a": torch.ones(2)}, tmp_path / "model.safetensors")
    (folder / INDEX).write_text(json.dumps({"weight_map": {"a": name}}))
    with pytest.raises(ValueError, match=r"outside the checkpoint|is missing"):
        shard_files(folder)


def shard_index(folder: Path, weights: dict[str, str]) -> None:
    (folder / INDEX).write_text(json.dumps({"weight_map": weights}))


def test_an_index_that_does_not_fit_its_shards(
    fails: Callable[..., str], model: Path, tmp_path: Path
) -> None:
    run = lambda: fails("prune", model, "--experts", 40, *TEXT, "-o", tmp_path / "out")  # noqa: E731
    names = [t.name for t in stored_tensors(model / "model.safetensors")]
    shard_index(model, dict.fromkeys([*names, "lost.weight"], "model.safetensors"))
    assert "lost.weight is not in model.safetensors" in run()
    save_file({names[0]: torch.ones(2)}, model / "more.safetensors")
    shard_index(model, dict.fromkeys(names, "model.safetensors") | {"x": "more.safetensors"})
    assert f"{names[0]} lies in model.safetensors and in more.safetensors" in run()
    shard_index(model, {})
    assert "names no shard" in run()


@pytest.mark.parametrize("engine", ["resident", "streaming"])
def test_a_tensor_that_is_missing_is_not_made_up(
    fails: Callable[..., str], model: Path, tmp_path: Path, engine: str
) -> None:
    tensors = load_file(model / "model.safetensors")
    del tensors["model.layers.2.self_attn.q_proj.weight"]
    save_file(tensors, model / "model.safetensors", {"format": "pt"})
    run = ["prune", model, "--experts", 40, *TEXT, "--engine", engine, "-o", tmp_path / "out"]
    assert "model.layers.2.self_attn.q_proj.weight" in fails(*run)
    assert not (tmp_path / "out").exists()


class Payload:
    """Unpickled, it writes a file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[object, ...]:
        return os.mkdir, (str(self.path),)


def test_a_pickle_is_refused_unread(fails: Callable[..., str], model: Path, tmp_path: Path) -> None:
    (model / "model.safetensors").unlink()
    (model / "pytorch_model.bin").write_bytes(pickle.dumps(Payload(tmp_path / "ran")))
    said = fails("prune", model, "--experts", 40, *TEXT, "-o", tmp_path / "out")
    assert "pytorch_model.bin is a pickle, which can run code when read" in said
    with pytest.raises(ValueError, match="safetensors files only"):
        Checkpoint(str(model)).load("float32", "cpu")
    assert not (tmp_path / "ran").exists()
    os.mkdir(tmp_path / "ran2")  # the payload itself works: unpickled, it would have run
    with pytest.raises(FileExistsError):
        pickle.loads(pickle.dumps(Payload(tmp_path / "ran2")))


def test_remote_code_that_was_not_asked_for(
    fails: Callable[..., str], model: Path, tmp_path: Path
) -> None:
    ran = tmp_path / "ran"
    (model / "evil.py").write_text(f"open({str(ran)!r}, 'w').close()\nclass E: pass\n")
    config = json.loads((model / "config.json").read_text())
    maps = {"AutoConfig": "evil.E", "AutoModelForCausalLM": "evil.E"}
    (model / "config.json").write_text(
        json.dumps(config | {"model_type": "made_up", "auto_map": maps})
    )
    fails("prune", model, "--experts", 40, *TEXT, "-o", tmp_path / "out")
    assert not ran.exists()


@pytest.mark.parametrize(
    ("kept", "said"),
    [
        ([0, 1, 2, 60], "must be one or more of 0..59"),
        ([-1, 1, 2, 3], "must be one or more of 0..59"),
        ([1, 1, 2, 3], "rising, each once"),
        ([3, 2, 1, 0], "rising, each once"),
        ([0, 1, 2.5, 3], "whole numbers"),
        ([0, 1, 2, True], "whole numbers"),
        (["0", "1", "2", "3"], "whole numbers"),
        ([], "must be one or more"),
        (7, "list of kept ids"),
        ([0, 1, 2], "not what its target asks for"),
    ],
)
def test_plans_with_impossible_ids(
    fails: Callable[..., str], plan_file: Path, tmp_path: Path, kept: object, said: str
) -> None:
    raw = json.loads(plan_file.read_text())
    raw["groups"][1]["kept"] = kept
    plan_file.write_text(json.dumps(raw))
    run = ["prune", MODEL, "--plan", plan_file, "--repair", "none", "-o", tmp_path / "out"]
    assert said in fails(*run)
    assert not (tmp_path / "out").exists()


def test_a_file_whose_bytes_cannot_be_read(
    fails: Callable[..., str], model: Path, tmp_path: Path
) -> None:
    """A file that is there and gives an input/output error at its first byte."""
    broken = Path("/proc/self/mem")
    if not broken.exists():
        pytest.skip("no /proc/self/mem on this system")
    with pytest.raises(OSError) as found:
        broken.read_bytes()
    assert found.value.errno == errno.EIO
    assert "Input/output error" in fails("prune", MODEL, "--plan", broken, "-o", tmp_path / "out")
    (model / "tokenizer.json").unlink()
    (model / "tokenizer.json").symlink_to(broken)
    run = ["prune", model, "--experts", 40, *TEXT, "-o", tmp_path / "out"]
    assert "Input/output error" in fails(*run)


@pytest.mark.slow
def test_a_read_error_while_the_result_is_copied(
    fails: Callable[..., str], plan_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    copy, calls = shard_writer._copy_some, []

    def broken(*arguments: int) -> int:
        calls.append(arguments)
        if len(calls) == 20:
            raise OSError(errno.EIO, os.strerror(errno.EIO), "model.safetensors")
        return copy(*arguments)

    monkeypatch.setattr(shard_writer, "_copy_some", broken)
    run = ["prune", MODEL, "--plan", plan_file, "--repair", "none", "-o", tmp_path / "out"]
    assert "Input/output error: 'model.safetensors'" in fails(*run)
    assert not (tmp_path / "out").exists()
    with pytest.raises(SystemExit, match="0"):
        main([str(a) for a in run])  # the disk is well again
    assert verify(tmp_path / "out", Checkpoint(str(MODEL))).ok


def test_a_source_that_shrinks_while_it_is_copied(
    fails: Callable[..., str], model: Path, plan_file: Path, tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    copy = shard_writer._copy_some

    def shrinking(*arguments: int) -> int:
        if (model / "model.safetensors").stat().st_size > 10**6:
            os.truncate(model / "model.safetensors", 10**6)
        return copy(*arguments)

    monkeypatch.setattr(shard_writer, "_copy_some", shrinking)
    run = ["prune", model, "--plan", plan_file, "--repair", "none", "-o", tmp_path / "out"]
    assert "bytes early while it was copied" in fails(*run)
    assert not (tmp_path / "out").exists()
