"""The screen: streams whose reader may leave, tables without markup, names without controls."""

from __future__ import annotations

import errno
import io
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from moe_fair.core.printable import printable

if TYPE_CHECKING:
    from rich.console import Console

READER_LEFT = (errno.EPIPE, errno.EIO)  # of a pipe; of a terminal


class _Descriptor(io.FileIO):
    """Standard output or error; what is written after the reader has left goes nowhere.

    Standard error tells of progress: that it cannot be told ends no run, whatever the reason.
    """

    def __init__(self, number: int, patient: bool) -> None:
        super().__init__(number, "w", closefd=False)
        self._patient = patient
        self._lost = False

    def write(self, data: Any) -> int:
        """All of it, for the layers above."""
        if not self._lost:
            try:
                return super().write(data)
            except OSError as e:
                self._lost = True
                if not self._patient and e.errno not in READER_LEFT:
                    raise OSError(e.errno, f"standard output: {e.strerror}") from e
        return memoryview(data).nbytes


@contextmanager
def streams() -> Iterator[None]:
    """Inside, standard output and error never fail because nobody reads them, or are closed."""
    for number in (0, 1, 2):  # a closed one would be the next file that is opened
        try:
            os.fstat(number)
        except OSError:
            os.open(os.devnull, os.O_RDWR)
    before = sys.stdout, sys.stderr
    if sys.stdout is sys.__stdout__:  # else somebody has put something in its place
        sys.stdout = _stream(sys.stdout, 1)
    if sys.stderr is sys.__stderr__:
        sys.stderr = _stream(sys.stderr, 2)
    try:
        yield
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        sys.stdout, sys.stderr = before


def _stream(stream: Any, number: int) -> io.TextIOWrapper:
    """A text stream to a descriptor, set as Python has set its own."""
    if stream is None:  # it was closed, and its number may be that of another file by now
        return open(os.devnull, "w")
    stream.flush()
    return io.TextIOWrapper(
        io.BufferedWriter(_Descriptor(number, patient=number == 2)),
        encoding=stream.encoding,
        errors="backslashreplace",  # of a name in bytes, or on a terminal that knows few letters
        line_buffering=stream.line_buffering,
    )


def say(line: str) -> None:
    """One line on standard error."""
    print(printable(line), file=sys.stderr, flush=True)


def console() -> Console:
    """What prints tables and texts: a bracket or a colon in a name is only that."""
    from rich.console import Console

    class Plain(Console):
        def render_str(self, text: str, **options: Any) -> Any:
            return super().render_str("\n".join(map(printable, text.split("\n"))), **options)

    return Plain(highlight=False, markup=False, emoji=False)
