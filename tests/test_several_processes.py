"""Started N times by a launcher: the same bytes as one process; one line when one of them dies."""

from __future__ import annotations

import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
import torch
from places import CALIBRATION, HELDOUT, MODEL, ROOT
from processes import Python, port
from torch.distributed import TCPStore

from moe_fair.cli import main
from moe_fair.core.units import STATISTICS_FILE
from moe_fair.engines.watch import Watch

# six batches in two chunks; the last batch of a domain is a short one
SMALL = [
    "prune", str(MODEL), "--experts", "40", "-c", str(CALIBRATION), "--samples", "10",
    "--length", "64", "--batch-size", "2", "--save-every", "3",
    "--heldout", str(HELDOUT), "--heldout-samples", "6", "--repair", "scale",
]  # fmt: skip
LONG = [*SMALL[:7], "48", *SMALL[8:11], "1", "--save-every", "4", "--repair", "none",
        "--self-share", "0"]  # fmt: skip
RESULT = (
    "model.safetensors", "moe_fair/statistics.tensors", "moe_fair/plan.json",
    "moe_fair/heldout.json", "moe_fair/repair.json",
)  # fmt: skip
ACCELERATE = [
    sys.executable, "-m", "accelerate.commands.launch", "--multi_gpu", "--mixed_precision", "no",
    "--dynamo_backend", "no",
]  # fmt: skip


def accelerate(n: int, *more: str) -> list[str]:
    """The command of one machine; on a machine without GPUs it starts CPU processes."""
    machines = [] if "--num_machines" in more else ["--num_machines", "1"]
    where = [] if "--main_process_port" in more else ["--main_process_port", port()]
    return [*ACCELERATE, "--num_processes", str(n), *machines, *where, *more, "-m", "moe_fair"]


def torchrun(n: int) -> list[str]:
    run = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", str(n)]
    return [*run, "--master_port", port(), "-m", "moe_fair"]


def start(command: list[str], log: Path, **extra: str) -> subprocess.Popen[bytes]:
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), **extra}
    with log.open("wb") as f:
        return subprocess.Popen(command, stdout=f, stderr=subprocess.STDOUT, env=environment)


def run(command: list[str], log: Path) -> str:
    """A launcher to its end; what all its processes said."""
    assert start(command, log).wait(timeout=400) == 0, log.read_text()
    return log.read_text()


def moe_fair(log: Path, *command: str, **extra: str) -> Python:
    """One process without a launcher."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", **extra}
    return Python(["-m", "moe_fair", *command], log, env=environment)


def by_hand(tmp_path: Path, world: int, where: str, rank: int, *command: str) -> Python:
    """One of several processes without a launcher, as a scheduler starts it."""
    return moe_fair(
        tmp_path / f"log{rank}", *command, RANK=str(rank), WORLD_SIZE=str(world),
        MASTER_ADDR="127.0.0.1", MASTER_PORT=where,
    )  # fmt: skip


def together(tmp_path: Path, world: int, *command: str) -> str:
    """Several processes to their end; what the first said."""
    where = port()
    every = [by_hand(tmp_path, world, where, rank, *command) for rank in range(world)]
    logs = [tmp_path / f"log{rank}" for rank in range(world)]
    assert [p.wait(timeout=400) for p in every] == [0] * world, [x.read_text() for x in logs]
    return logs[0].read_text()


def run_alone(log: Path, *command: str) -> str:
    """One process to its end; what it said."""
    assert moe_fair(log, *command).wait(timeout=400) == 0, log.read_text()
    return log.read_text()


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What one process makes, with as many threads as each of the others has."""
    output = tmp_path_factory.mktemp("alone") / "out"
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    with pytest.raises(SystemExit, match="0"):
        main([*SMALL, "-o", str(output)])
    torch.set_num_threads(threads)
    return output


def same(a: Path, b: Path) -> None:
    for name in RESULT:
        assert (a / name).read_bytes() == (b / name).read_bytes(), name


@pytest.mark.slow
def test_two_by_accelerate(tmp_path: Path, alone: Path) -> None:
    said = run([*accelerate(2), *SMALL, "-o", str(tmp_path / "out")], tmp_path / "log")
    same(tmp_path / "out", alone)
    assert "2 of 2 processes share the batches" in said
    for once in ("calibrating on", "disk: about", "written in", "240 of 360", "load it with"):
        assert said.count(once) == 1, said
    assert sorted(p.name for p in tmp_path.iterdir()) == ["log", "out"]


@pytest.mark.slow
@pytest.mark.nightly
def test_three_streaming_read_the_weights_once(tmp_path: Path, alone: Path) -> None:
    streaming = [*SMALL, "--engine", "streaming", "-o"]
    said = together(tmp_path, 3, *streaming, str(tmp_path / "out"))
    same(tmp_path / "out", alone)
    single = run_alone(tmp_path / "log", *streaming, str(tmp_path / "one"))
    read = [re.findall(r"; ([\d,]+) bytes", s) for s in (said, single)]
    assert read[0] == read[1]
    assert int(read[0][0].replace(",", "")) > 2 * (MODEL / "model.safetensors").stat().st_size


@pytest.mark.slow
@pytest.mark.nightly
def test_four_are_more_than_a_chunk_has_batches(tmp_path: Path, alone: Path) -> None:
    said = together(tmp_path, 4, *SMALL, "-o", str(tmp_path / "out"))
    same(tmp_path / "out", alone)
    assert "3 of 4 processes share the batches; a chunk has no more than 3" in said


@pytest.mark.slow
@pytest.mark.nightly
def test_two_machines(tmp_path: Path, alone: Path) -> None:
    """Two launchers, two process groups; each takes itself for a machine of its own."""
    where = ["--main_process_ip", "127.0.0.1", "--main_process_port", port()]
    launchers = []
    for rank in ("0", "1"):
        command = accelerate(2, "--num_machines", "2", "--machine_rank", rank, *where)
        more = [*SMALL, "--engine", "streaming", "-o", str(tmp_path / "out")]
        launchers.append(start([*command, *more], tmp_path / f"log{rank}"))
    assert [launcher.wait(timeout=400) for launcher in launchers] == [0, 0]
    same(tmp_path / "out", alone)
    assert "load it with" in (tmp_path / "log0").read_text()
    assert "moe-fair" not in (tmp_path / "log1").read_text()
    assert "calibrat" not in (tmp_path / "log1").read_text()


# choices and rolling passages, an odd number of batches, one too few for both processes
EVALUATION = [
    "eval", str(MODEL), "--baseline", str(MODEL), "--include-path", str(ROOT / "eval" / "tasks"),
    "--tasks", "local_choice_python,local_passages_rust-docs", "--limit", "5",
    "--batch-size", "4", "--log-samples", "--json", "--agreement", "--heldout", str(HELDOUT),
    "--heldout-samples", "6", "--length", "32",
]  # fmt: skip


@pytest.fixture(scope="module")
def evaluated(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What one process finds: its screen in `log`, its files in `one`."""
    folder = tmp_path_factory.mktemp("evaluated")
    run_alone(folder / "log", *EVALUATION, "-o", str(folder / "one"))
    return folder


@pytest.mark.slow
@pytest.mark.nightly
def test_evaluation_is_that_of_one_process(evaluated: Path, tmp_path: Path) -> None:
    alone = (evaluated / "log").read_text()
    shared = together(tmp_path, 2, *EVALUATION, "-o", str(tmp_path / "two"))
    assert shared.count('"benchmarks"') == 1
    assert shared[shared.index("{") :] == alone[alone.index("{") :]
    one, two = (
        {p.name.split("-", 5)[-1]: p for p in folder.rglob("*") if p.is_file()}
        for folder in (evaluated / "one", tmp_path / "two")
    )
    assert one.keys() == two.keys()
    assert len(one) == 8
    for name, path in one.items():
        if path.parent.name == "lm-eval" and path.suffix == ".json":
            a, b = (json.loads(p.read_text()) for p in (path, two[name]))
            assert a["results"] == b["results"]
            assert a["config"] == b["config"]
        else:
            assert path.read_bytes() == two[name].read_bytes(), name


def ours(log: Path) -> list[str]:
    return [line for line in log.read_text().splitlines() if line.startswith("moe-fair: error")]


@pytest.mark.slow
@pytest.mark.skipif(torch.cuda.is_available(), reason="the second process must miss its device")
def test_one_process_fails(tmp_path: Path) -> None:
    where, out = port(), ["-o", str(tmp_path / "out")]
    both = [
        by_hand(tmp_path, 2, where, 0, *LONG, *out),
        by_hand(tmp_path, 2, where, 1, *LONG, *out, "--device", "cuda"),
    ]
    assert all(p.wait(timeout=120) != 0 for p in both)
    [line] = ours(tmp_path / "log0") + ours(tmp_path / "log1")
    assert "--device cuda: torch sees no CUDA device here" in line
    assert f"(process 1 of 2 on {socket.gethostname()})" in line
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
def test_bad_input_is_said_once(tmp_path: Path) -> None:
    where = port()
    wrong = [*SMALL, "--experts", "3", "-o", str(tmp_path / "out")]
    both = [by_hand(tmp_path, 2, where, rank, *wrong) for rank in (0, 1)]
    assert all(p.wait(timeout=120) != 0 for p in both)
    [line] = ours(tmp_path / "log0") + ours(tmp_path / "log1")
    assert line.endswith("the router picks top 4; choose 4 to 60 per layer")


def test_a_process_that_has_left_is_not_taken_for_killed() -> None:
    """Its watch looks once more after it has said that it leaves, and does not unsay it."""
    store = TCPStore("127.0.0.1", int(port()), is_master=True, wait_for_workers=False)
    watch = Watch(store, 0, [{"pid": os.getpid(), "host": "here", "node": "here"}])
    watch.start()
    watch.leave()
    watch._look()
    assert store.get("pulse/0") == b"done"
    watch.stop()


def rank_of(process: psutil.Process) -> str | None:
    try:
        return process.environ().get("RANK")
    except (psutil.NoSuchProcess, psutil.AccessDenied):
        return None


def kill_rank(launcher: subprocess.Popen[bytes], rank: int, sign: Path) -> float:
    """kill -9 one process once the sign has appeared; returns when."""
    give_up = time.monotonic() + 200
    while not sign.exists():
        assert time.monotonic() < give_up, f"{sign} never appeared"
        assert launcher.poll() is None
        time.sleep(0.01)
    children = psutil.Process(launcher.pid).children(recursive=True)
    [child] = [c for c in children if rank_of(c) == str(rank)]
    child.send_signal(signal.SIGKILL)
    return time.monotonic()


@pytest.mark.slow
def test_a_killed_process_ends_the_run_and_the_rerun_goes_on(tmp_path: Path) -> None:
    out, work = tmp_path / "out", tmp_path / "out.calibrating"
    launcher = start([*torchrun(2), *LONG, "-o", str(out)], tmp_path / "log")
    killed = kill_rank(launcher, 0, work / "chunk-00001" / STATISTICS_FILE)
    assert launcher.wait(timeout=120) != 0
    assert time.monotonic() - killed < 30
    [line] = ours(tmp_path / "log")
    assert f"process 0 of 2 on {socket.gethostname()} was killed" in line
    assert not out.exists()
    done = len(list(work.glob(f"*/{STATISTICS_FILE}")))
    said = run_alone(tmp_path / "log", *LONG, "-o", str(out))
    assert f"going on: {done} of 12 chunks" in said, said[:3000]


@pytest.mark.slow
@pytest.mark.parametrize(
    "number", [pytest.param(signal.SIGINT, marks=pytest.mark.nightly), signal.SIGTERM]
)
def test_a_signal_to_all_is_answered_once(tmp_path: Path, number: signal.Signals) -> None:
    """As Ctrl-C and schedulers send it; the first process's lock goes with it."""
    where, out = port(), tmp_path / "out"
    both = [by_hand(tmp_path, 2, where, rank, *LONG, "-o", str(out)) for rank in (0, 1)]
    give_up = time.monotonic() + 200
    while not (tmp_path / "out.calibrating" / "chunk-00001" / STATISTICS_FILE).exists():
        assert time.monotonic() < give_up
        time.sleep(0.01)
    assert (tmp_path / "out.lock").exists()
    for process in both:
        process.kill(number)
    assert [p.wait(timeout=30) for p in both] == [128 + number] * 2
    lines = [(tmp_path / f"log{rank}").read_text() for rank in (0, 1)]
    said = "interrupted" if number == signal.SIGINT else "ended by a signal"
    assert lines[0].count(f"moe-fair: {said}") == 1, lines[0]
    assert not any("Traceback" in x for x in lines), lines
    assert "moe-fair: " not in lines[1]
    assert not (tmp_path / "out.lock").exists()
    assert (tmp_path / "out.calibrating").is_dir()


@pytest.mark.slow
@pytest.mark.nightly
def test_a_machine_that_is_lost_ends_the_others(tmp_path: Path) -> None:
    where = ["--main_process_ip", "127.0.0.1", "--main_process_port", port()]
    launchers = []
    for rank in ("0", "1"):
        command = accelerate(2, "--num_machines", "2", "--machine_rank", rank, *where)
        more = [*LONG, "-o", str(tmp_path / "out")]
        launchers.append(start([*command, *more], tmp_path / f"log{rank}"))
    killed = kill_rank(launchers[1], 1, tmp_path / "out.calibrating" / "chunk-00000")
    assert all(launcher.wait(timeout=120) != 0 for launcher in launchers)
    assert time.monotonic() - killed < 30
    [line] = ours(tmp_path / "log0")
    assert "process 1 of 2" in line
