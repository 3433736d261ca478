"""One run at a time writes an output: a file that names its owner, locked by the kernel.

The kernel's lock (flock) goes with its process, however that ends, and reaches across containers
that share a disk. Where a file system has no such locks, the process that the file names is looked
for. Of another machine neither says anything for certain: its lock is left alone.
"""

from __future__ import annotations

import errno
import fcntl
import json
import os
import socket
import stat
import time
from contextlib import suppress
from dataclasses import asdict, dataclass
from datetime import datetime
from pathlib import Path

import psutil

WITHOUT = (errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP, errno.EINVAL)  # no locks on this disk
WRITING = 1.0  # seconds that an owner may take to enter itself

_held: dict[Path, int] = {}


@dataclass(frozen=True)
class Owner:
    """A process that writes.

    Attributes:
        machine: one start of one kernel; containers on it share it.
        started: when the process did, in seconds since 1970; another may have its number later.
    """

    host: str
    machine: str
    pid: int
    started: float

    def __str__(self) -> str:
        started = datetime.fromtimestamp(self.started).astimezone().isoformat(" ", "seconds")
        return f"process {self.pid} on {self.host}, started {started}"

    def runs(self) -> bool:
        """The process is there; asked on its own machine."""
        try:
            found = psutil.Process(self.pid)
            same = abs(found.create_time() - self.started) < 2  # clocks are set
            return same and found.status() != psutil.STATUS_ZOMBIE
        except psutil.NoSuchProcess:
            return False


def this_process() -> Owner:
    """The owner of what is locked from here."""
    started = psutil.Process().create_time()
    return Owner(socket.gethostname(), _machine(), os.getpid(), started)


def _machine() -> str:
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    except OSError:  # not Linux
        return socket.gethostname()


def take(path: Path, output: Path) -> None:
    """Lock an output for this process, or take the lock of an owner that is gone.

    Args:
        path: of the lock file, made where it is not.
        output: what it stands for, as it is called in an error.

    Raises:
        ValueError: another process has it, or may have it.
    """
    while True:
        opened = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o666)
        try:
            free = _lock(opened)
            if not _is_at(opened, path):  # its owner has just removed it
                os.close(opened)
                continue
            owner = _read(opened, path, wait=free is False)
            if free is False or (owner is not None and not _gone(owner, bool(free))):
                raise ValueError(_refusal(owner, path, output))
            os.ftruncate(opened, 0)
            os.pwrite(opened, json.dumps(asdict(this_process())).encode(), 0)
        except BaseException:
            os.close(opened)
            raise
        _held[path] = opened
        return


def release(path: Path) -> None:
    """Remove a lock of this process; nothing where it has none."""
    opened = _held.pop(path, None)
    if opened is not None:
        if _is_at(opened, path):
            with suppress(OSError):  # its folder may not be writable any more
                path.unlink()
        os.close(opened)


def release_all() -> None:
    """Remove all locks of this process, which is about to end."""
    for path in list(_held):
        release(path)


def _lock(opened: int) -> bool | None:
    """The kernel's lock: had now, or another's; None where the file system knows none."""
    try:
        fcntl.flock(opened, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError as e:
        if e.errno in WITHOUT:
            return None
        raise
    return True


def _is_at(opened: int, path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(opened), path.lstat())
    except FileNotFoundError:
        return False


def _read(opened: int, path: Path, *, wait: bool) -> Owner | None:
    """Who has written into the file; None for nobody.

    Raises:
        ValueError: it is not a lock of ours.
    """
    give_up = time.monotonic() + (WRITING if wait else 0)
    if not stat.S_ISREG(os.fstat(opened).st_mode):
        raise ValueError(_foreign(path))
    while not (text := os.pread(opened, 10_000, 0)) and time.monotonic() < give_up:
        time.sleep(0.01)
    if not text:
        return None
    try:
        raw = json.loads(text)
        return Owner(str(raw["host"]), str(raw["machine"]), int(raw["pid"]), float(raw["started"]))
    except (ValueError, KeyError, TypeError, RecursionError) as e:
        raise ValueError(_foreign(path)) from e


def _foreign(path: Path) -> str:
    return f"{path} is in the way: a lock stands there during a run; remove it, or write elsewhere"


def _gone(owner: Owner, locked: bool) -> bool:
    """The process that a lock names has ended, for certain.

    Args:
        locked: this process has the kernel's lock.
    """
    if owner.machine == _machine():
        return locked or not owner.runs()
    return owner.host == socket.gethostname()  # the machine was started again


def _refusal(owner: Owner | None, path: Path, output: Path) -> str:
    if owner is None:
        return f"{output} is being written by another process; wait for it, or write elsewhere"
    text = f"{output} is being written by {owner}; wait for it, or write elsewhere"
    if owner.machine != _machine():
        text += f" (if it runs there no more, remove {path})"
    return text
