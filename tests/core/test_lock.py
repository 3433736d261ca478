"""Locks of outputs: whose are respected, and whose are taken over."""

from __future__ import annotations

import errno
import fcntl
import json
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, replace
from pathlib import Path

import pytest

from moe_fair.core import lock
from moe_fair.core.lock import Owner, release, release_all, take, this_process

HOLD = """
import sys, time
from pathlib import Path
from moe_fair.core.lock import take
take(Path(sys.argv[1]), Path("out"))
print("has it", flush=True)
time.sleep(60)
"""


@contextmanager
def held(path: Path) -> Iterator[subprocess.Popen[str]]:
    """Another process holds the lock."""
    command = [sys.executable, "-c", HOLD, str(path)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as other:
        assert other.stdout is not None
        assert other.stdout.readline() == "has it\n"
        yield other
        other.kill()


def refused(path: Path) -> str:
    with pytest.raises(ValueError) as found:
        take(path, Path("out"))
    return str(found.value)


def taken(path: Path) -> None:
    """It can be had; afterwards it is not left."""
    take(path, Path("out"))
    assert Owner(**json.loads(path.read_text())) == this_process()
    release(path)
    assert not path.exists()


@pytest.fixture
def without_kernel_locks(monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a file system that knows none: the system call gives this error there."""

    def flock(*_: int) -> None:
        raise OSError(errno.ENOSYS, os.strerror(errno.ENOSYS))

    monkeypatch.setattr(fcntl, "flock", flock)


def test_of_a_process_that_runs(tmp_path: Path) -> None:
    path = tmp_path / "out.lock"
    with held(path) as other:
        said = refused(path)
        assert said.startswith(f"out is being written by process {other.pid} on ")
        assert f"on {socket.gethostname()}, started 2" in said
        assert said.endswith("; wait for it, or write elsewhere")
    taken(path)  # it was killed: nothing has removed its file


@pytest.mark.usefixtures("without_kernel_locks")
def test_where_the_kernel_has_no_locks(tmp_path: Path) -> None:
    path = tmp_path / "out.lock"
    with held(path) as other:  # that process has a kernel's lock, which is not looked at here
        assert f"process {other.pid} on " in refused(path)
        os.kill(other.pid, signal.SIGKILL)
        os.waitid(os.P_PID, other.pid, os.WEXITED | os.WNOWAIT)
        taken(path)  # dead, though its parent has not asked yet
    path.write_text(json.dumps(asdict(replace(this_process(), started=1e9))))
    taken(path)  # another process had this number
    path.write_text(json.dumps(asdict(this_process())))
    assert "being written by process" in refused(path)


def test_in_one_process(tmp_path: Path) -> None:
    path = tmp_path / "out.lock"
    take(path, Path("out"))
    assert f"process {os.getpid()} on " in refused(path)
    release(path)
    take(path, Path("out"))
    take(tmp_path / "other.lock", Path("other"))
    release_all()
    assert list(tmp_path.iterdir()) == []


def test_of_another_machine(tmp_path: Path) -> None:
    """Its processes cannot be seen from here, and not every file system locks across machines."""
    path = tmp_path / "out.lock"
    there = replace(this_process(), host="elsewhere", machine="another")
    path.write_text(json.dumps(asdict(there)))
    said = refused(path)
    assert f"process {os.getpid()} on elsewhere, started " in said
    assert said.endswith(f"(if it runs there no more, remove {path})")
    assert path.exists()
    path.write_text(json.dumps(asdict(replace(there, host=socket.gethostname()))))
    taken(path)  # this machine, before it was started again
    path.write_text(json.dumps(asdict(replace(this_process(), host="a-container"))))
    taken(path)  # the kernel says that its process has ended


@pytest.mark.parametrize("text", ["mine", "{}", "[" * 9000, '{"host": 1, "pid": "x"}'])
def test_a_file_that_is_no_lock(tmp_path: Path, text: str) -> None:
    path = tmp_path / "out.lock"
    path.write_text(text)
    assert "out.lock is in the way" in refused(path)
    assert path.read_text() == text


def test_an_empty_file_is_a_lock_that_nobody_has(tmp_path: Path) -> None:
    path = tmp_path / "out.lock"
    path.touch()  # killed before it could enter itself
    taken(path)


def test_a_link_is_not_followed(tmp_path: Path) -> None:
    (tmp_path / "out.lock").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(OSError, match="symbolic links"):
        take(tmp_path / "out.lock", Path("out"))
    assert not (tmp_path / "elsewhere").exists()


def test_one_that_is_released_while_it_is_opened(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two that wait for one: whoever has opened the old file begins again."""
    path, stock = tmp_path / "out.lock", lock._lock
    path.touch()

    def late(opened: int) -> bool | None:
        monkeypatch.setattr(lock, "_lock", stock)
        path.unlink()  # its owner has just ended
        return stock(opened)

    monkeypatch.setattr(lock, "_lock", late)
    taken(path)
