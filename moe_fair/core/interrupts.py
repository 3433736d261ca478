"""SIGINT and SIGTERM: the first ends a run in order, a second at once.

Python handles signals between two of its own steps. A second signal must end the process also while
its main thread computes in C code, so a thread of its own sees signals as they come.
"""

from __future__ import annotations

import os
import select
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType

from moe_fair.core.lock import release_all

HANDLED = (signal.SIGINT, signal.SIGTERM)
PATIENCE = 3.0  # seconds after SIGTERM in which the main thread must have ended by itself


class Interrupted(BaseException):
    """A signal ends the run. Not a KeyboardInterrupt, which the option parser takes for its own.

    Attributes:
        number: of the signal.
    """

    def __init__(self, number: int) -> None:
        super().__init__(signal.Signals(number).name)
        self.number = number


_caught: int | None = None  # the first signal
_closing = False
_whole: Path | None = None


def caught() -> int | None:
    """The signal that ends this run, once there is one."""
    return _caught


def whole() -> Path | None:
    """The result that already stood under its name when the signal came."""
    return _whole


@contextmanager
def closing(output: Path) -> Iterator[None]:
    """Inside, a result gets its name and what it was made from goes: no signal comes between."""
    global _closing, _whole
    _closing = True
    try:
        yield
        _whole = output
    finally:
        _closing = False
    if _caught is not None:
        raise Interrupted(_caught)


@contextmanager
def handled(*, alone: bool = True) -> Iterator[None]:
    """Inside, the first signal raises `Interrupted` in the main thread, a second ends the process.

    Signals that are ignored, as under `nohup` or in the background of a script, stay ignored.

    Args:
        alone: there is no launcher; otherwise `distributed` watches for SIGTERM by itself.
    """
    global _caught, _closing, _whole
    _caught, _closing, _whole = None, False, None
    if threading.current_thread() is not threading.main_thread():
        yield  # only the main thread may
        return
    numbers = [n for n in (HANDLED if alone else HANDLED[:1]) if _is_default(n)]
    before = {n: signal.signal(n, _handle) for n in numbers}
    thread = _Seconds() if alone else None
    try:
        yield
    finally:
        if thread is not None:
            thread.stop()
        for number, handler in before.items():
            # once one has come, another ends the process wherever it is
            signal.signal(number, handler if _caught is None else signal.SIG_DFL)
        _caught = None  # what runs afterwards in this process is another run


def _is_default(number: int) -> bool:
    return signal.getsignal(number) in (signal.SIG_DFL, signal.default_int_handler)


def _handle(number: int, _: FrameType | None) -> None:
    global _caught
    if _caught is not None:
        end(number)
    _caught = number
    if not _closing:
        raise Interrupted(number)


def end(number: int) -> None:
    """End this process now; its locks go with it."""
    release_all()
    if os.isatty(2):
        os.write(2, b"\x1b[?25h\n")  # a progress bar hides the cursor
    os._exit(128 + number)


class _Seconds(threading.Thread):
    """Ends the process at the second signal, or some time after SIGTERM."""

    def __init__(self) -> None:
        super().__init__(daemon=True)
        self._reader, self._writer = os.pipe()
        os.set_blocking(self._writer, False)
        self._before = signal.set_wakeup_fd(self._writer, warn_on_full_buffer=False)
        self.start()

    def run(self) -> None:
        """Until the writing end is closed."""
        seen, deadline = 0, None
        while True:
            left = None if deadline is None else max(0.0, deadline - time.monotonic())
            if not select.select([self._reader], [], [], left)[0]:
                end(signal.SIGTERM)
            got = os.read(self._reader, 1)
            if not got:
                return
            if got[0] not in HANDLED:
                continue
            seen += 1
            if seen > 1:
                end(got[0])
            if got[0] == signal.SIGTERM:
                deadline = time.monotonic() + PATIENCE

    def stop(self) -> None:
        """The run has ended by itself."""
        signal.set_wakeup_fd(self._before)
        os.close(self._writer)
        self.join()
        os.close(self._reader)
