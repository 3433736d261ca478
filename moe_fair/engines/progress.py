"""Progress of long work on a terminal: rate, time left, memory in use. Quiet elsewhere."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from typing import Any

import psutil

from moe_fair.engines.batch import Batch
from moe_fair.engines.processes import is_first


def memory() -> str:
    """Resident memory of this process."""
    return f"{psutil.Process().memory_info().rss / 1e9:.1f} GB"


class Progress:
    """A bar for work whose size in tokens is known; used as a context manager.

    Of several processes the first alone shows its own share.

    Args:
        what: said in front of the bar.
        tokens: of the whole work, over all passes.
    """

    def __init__(self, what: str, tokens: int) -> None:
        self._bar = _bar() if sys.stderr.isatty() and is_first() else None
        if self._bar:
            self._task = self._bar.add_task(what, total=tokens, rate="", memory=memory())

    def __enter__(self) -> Progress:
        if self._bar:
            self._bar.start()
        return self

    def __exit__(self, *exception: object) -> None:
        if self._bar:
            self._bar.stop()

    def add(self, tokens: int) -> None:
        """There is more to do than was said."""
        if self._bar:
            self._bar.update(self._task, total=(self._bar.tasks[0].total or 0) + tokens)

    def advance(self, tokens: int) -> None:
        """So much more is done."""
        if self._bar:
            self._bar.advance(self._task, tokens)
            speed = self._bar.tasks[0].speed
            rate = f"{speed:,.0f} tokens/s" if speed else ""
            self._bar.update(self._task, rate=rate, memory=memory())

    def visit(self, what: str, layer: int | None, batches: Sequence[Batch]) -> Iterator[Batch]:
        """Yield the batches of one pass, showing rate, time left and memory."""
        for batch in batches:
            yield batch
            if self._bar:
                where = what if layer is None else f"{what}, layer {layer}"
                self._bar.update(self._task, description=where)
                self.advance(int(batch.mask.sum()))


def _bar() -> Any:
    from rich.console import Console
    from rich.progress import BarColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn
    from rich.progress import Progress as Bar

    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        TextColumn("{task.percentage:>3.0f}%"),
        TextColumn("{task.fields[rate]}"),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
        TextColumn("{task.fields[memory]}"),
    )
    return Bar(*columns, console=Console(stderr=True), transient=True)
