"""A process that is set apart before a run opens its model, and builds the result when it is done.

It is forked from a command that has imported the libraries and nothing else: what it knows of the
model stands in the result's files, as in a process that is started anew, and code of one's own it
imports itself. Importing torch and transformers once more, four seconds, is what that saves. What
it does not build is built once more by a process that is started (`reload`), which decides.

Where no process can be forked with what torch has loaded, as on macOS, there is none.
"""

from __future__ import annotations

import gc
import multiprocessing
import os
import signal
import subprocess
import sys
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from multiprocessing.connection import Connection
from pathlib import Path

from moe_fair.core.garbage import uncollected
from moe_fair.vision import afresh
from moe_fair.vision.checkpoint import PRUNED_FILE
from moe_fair.vision.load import parse_function
from moe_fair.vision.trace import one_line

LONGEST = 600.0  # seconds after which one that is started is asked instead: some library may hang

Ended = Callable[[], "subprocess.CompletedProcess[str]"]
Elsewhere = Callable[[list[str]], "_Asked"]


class _Asked:
    """The process at work: a context that gives the function that waits for it."""

    def __init__(self, connection: Connection, arguments: list[str]) -> None:
        self._connection, self._arguments = connection, arguments

    def __enter__(self) -> Ended:
        with suppress(OSError):  # it has ended, which `_ended` says
            self._connection.send(self._arguments)
        return self._ended

    def __exit__(self, *exception: object) -> None: ...

    def _ended(self) -> subprocess.CompletedProcess[str]:
        try:
            answered = self._connection.poll(LONGEST)
            said = self._connection.recv() if answered else f"no answer in {LONGEST:.0f} s"
        except (EOFError, OSError):
            said = "it ended without an answer"
        return subprocess.CompletedProcess(self._arguments, int(bool(said)), "", said)


@contextmanager
def set_apart(model: str) -> Iterator[Elsewhere | None]:
    """What asks the process to build a result, once; it ends with the block.

    Args:
        model: as a user names it, which says what libraries it needs.
    """
    if sys.platform != "linux":
        yield None
        return
    with uncollected():
        _import_libraries(model)
    gc.freeze()  # else looking for garbage copies for both processes what they share
    ours, theirs = multiprocessing.Pipe()
    forked = multiprocessing.get_context("fork")
    process = forked.Process(target=_wait, args=(theirs, ours), daemon=True)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # of threads: none that holds a lock
        process.start()
    theirs.close()
    try:
        yield lambda arguments: _Asked(ours, arguments)
    finally:
        ours.close()
        process.kill()
        process.join()


def _import_libraries(model: str) -> None:
    if parse_function(model) is None and not (Path(model) / PRUNED_FILE).is_file():
        import transformers.modeling_utils  # noqa: F401


def _wait(connection: Connection, other: Connection) -> None:
    """What the process does: nothing, until it is asked, or the other side is gone."""
    other.close()
    signal.set_wakeup_fd(-1)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # of the whole group; the other side ends this one
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    nowhere = os.open(os.devnull, os.O_RDWR)
    for stream in (0, 1, 2):
        os.dup2(nowhere, stream)
    gc.disable()
    try:
        arguments = connection.recv()
    except EOFError:
        return
    try:
        afresh.main(*arguments)
    except Exception as e:  # of the model's own code, too
        connection.send(one_line(e))
    else:
        connection.send("")
