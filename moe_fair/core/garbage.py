"""Python's search for garbage, left out where there is none: a third of a second of `plan`, three
of an image run, which imports transformers' models in two processes.

Importing torch makes some hundred thousand objects that all stay. Python looks through them for
cycles again and again while it grows, and once more when it ends.
"""

from __future__ import annotations

import atexit
import gc
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def uncollected() -> Iterator[None]:
    """No search while this lasts: for imports."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


def end_uncollected() -> None:
    """No search when Python ends; for a process that is the command's own."""
    atexit.unregister(gc.freeze)  # once is enough
    atexit.register(gc.freeze)
