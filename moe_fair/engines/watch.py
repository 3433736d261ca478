"""Looking after the other processes of a run, in a thread that also sees signals.

The main thread may wait for the others in C code, where no signal handler of Python runs.
"""

from __future__ import annotations

import atexit
import json
import os
import select
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import suppress
from typing import TYPE_CHECKING, Any, NoReturn

from moe_fair.core.interrupts import caught
from moe_fair.core.lock import release_all
from moe_fair.core.printable import printable

if TYPE_CHECKING:
    from torch.distributed import Store

HEARTBEAT_SECONDS = 0.5  # seconds between two looks at the others
HEARTBEAT_TIMEOUT = (
    20.0  # seconds without a sign of life after which another machine counts as lost
)
ANEW = "start the same command again and it goes on"


class Watch(threading.Thread):
    """Looks after the other processes; ends this one where another is lost or has failed."""

    def __init__(self, store: Store, rank: int, members: list[dict[str, Any]]) -> None:
        super().__init__(daemon=True)
        self.rank, self.members = rank, members
        self.store = store
        self._own = clone(store)  # of this thread: the main one may be waiting at its own
        self._stopped = threading.Event()
        self._pulse = 0
        self._seen: dict[int, tuple[bytes, float]] = {}
        self._troubles = 0
        self._claimed = False
        self._left = False
        self._pulses = threading.Lock()  # nobody's last pulse is overwritten by one before it
        self._signals, writer = os.pipe()
        os.set_blocking(writer, False)
        if threading.current_thread() is threading.main_thread():
            # the byte is written at once, even while the main thread is inside a collective
            signal.signal(signal.SIGTERM, lambda *_: None)
            signal.set_wakeup_fd(writer, warn_on_full_buffer=False)
        self._own.set(f"pulse/{rank}", "0")
        atexit.register(self.leave)

    def describe(self, rank: int) -> str:
        """`2 of 4 on node-b`."""
        return f"{rank} of {len(self.members)} on {self.members[rank]['host']}"

    def claim(self, message: str) -> bool:
        """Enter why the run ends; False where another process, or another thread, was first."""
        if self._claimed:
            return False
        self._claimed = True
        said = json.dumps({"rank": self.rank, "message": message})
        try:
            return self._mine().compare_set("failed", "", said) == said.encode()
        except RuntimeError:  # the store has gone with its machine: each says what it knows
            return True

    def leave(self) -> None:
        """This process ends by itself: the others need not ask who killed it."""
        with self._pulses, suppress(RuntimeError):
            self._left = True
            self._mine().set(f"pulse/{self.rank}", "done")

    def _mine(self) -> Store:
        """The connection of the thread that asks; a new one would wait for a store that is gone."""
        return self._own if threading.current_thread() is self else self.store

    def stop(self) -> None:
        """No more looking: the run has ended well."""
        atexit.unregister(self.leave)
        self._stopped.set()
        if threading.current_thread() is threading.main_thread():
            signal.set_wakeup_fd(-1)
            signal.signal(signal.SIGTERM, signal.SIG_DFL)
        self.join()

    def run(self) -> None:
        """Look, wait, look again."""
        while not self._stopped.is_set():
            ready, _, _ = select.select([self._signals], [], [], HEARTBEAT_SECONDS)
            if ready:
                self._signalled(os.read(self._signals, 1)[0])
            try:
                self._look()
                self._troubles = 0
            except RuntimeError:
                self._troubles += 1
                if self._troubles > 2 and not self._stopped.is_set():
                    self._end("the machine of process 0 does not answer any more", 1)

    def _signalled(self, number: int) -> None:
        if number == signal.SIGINT:
            # the main thread leaves by itself where it can, and at once at a second signal
            select.select([self._signals], [], [], 3)
            if self.rank == 0 and caught() is None:  # it waits for the others
                print_now("moe-fair: interrupted; the same command goes on where it stopped")
            end_now(130)
        if number == signal.SIGTERM:
            with suppress(RuntimeError):  # a launcher that lost a process ends the others this way
                self._look()
            self.leave()
            if self.rank == 0:
                print_now(
                    "moe-fair: ended by a signal; start the same command again and it goes on"
                )
            end_now(128 + number)

    def _look(self) -> None:
        for r in self._neighbours():
            if not _alive(self.members[r]["pid"]) and self._own.get(f"pulse/{r}") != b"done":
                self._end_failed()
                self._end(f"process {self.describe(r)} was killed", 1)
        self._end_failed()
        with self._pulses:
            if not self._left:
                self._pulse += 1
                self._own.set(f"pulse/{self.rank}", str(self._pulse))
        now = time.monotonic()
        heard: dict[str, float] = {}
        for r, m in enumerate(self.members):
            if m["node"] == self.members[self.rank]["node"] or not self._own.check([f"pulse/{r}"]):
                continue
            pulse = self._own.get(f"pulse/{r}")
            if self._seen.get(r, (b"", 0.0))[0] != pulse or pulse == b"done":
                self._seen[r] = (pulse, now)
            heard[m["node"]] = max(heard.get(m["node"], 0.0), self._seen[r][1])
        for node, when in heard.items():
            if now - when > HEARTBEAT_TIMEOUT:
                lost = next(r for r, m in enumerate(self.members) if m["node"] == node)
                who = self.describe(lost)
                text = f"process {who} has not been heard of for {HEARTBEAT_TIMEOUT:.0f} s"
                self._end(text, 1)

    def _neighbours(self) -> Iterator[int]:
        for r, m in enumerate(self.members):
            if r != self.rank and m["node"] == self.members[self.rank]["node"]:
                yield r

    def _end_failed(self) -> None:
        """Follow another process that has failed; on its own machine it has spoken itself."""
        if not self._own.check(["failed"]):
            return
        said = json.loads(self._own.get("failed"))
        if said["rank"] == self.rank:
            return
        there = self.members[said["rank"]]["node"] == self.members[self.rank]["node"]
        if not there and self.rank < min(self._neighbours(), default=self.rank + 1):
            print_now(f"{said['message']} (process {self.describe(said['rank'])})")
        if self.rank == 0:  # the store may be this process's: the others look first
            time.sleep(4 * HEARTBEAT_SECONDS)
        end_now(1)

    def _end(self, text: str, code: int) -> NoReturn:
        message = f"moe-fair: error: {text}; {ANEW}"
        if self.claim(message):
            print_now(message)
            time.sleep(4 * HEARTBEAT_SECONDS)  # the others read it in the store
        end_now(code)


def end_now(code: int) -> NoReturn:
    """End this process from whichever thread; a lock of its own would stay."""
    release_all()
    os._exit(code)


def print_now(line: str) -> None:
    """At once and whole, from a thread whose process is about to end."""
    with suppress(OSError):  # nobody reads it
        os.write(2, (printable(line) + "\n").encode())


def clone(store: Store) -> Store:
    """The same store over another connection, for another thread."""
    return store.clone()  # type: ignore[attr-defined]  # missing in torch's stubs


def _alive(pid: int) -> bool:
    import psutil

    try:
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False
