"""Progress of long work on a terminal: rate, time left, memory in use. Quiet elsewhere."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence

import psutil

from moe_fair.engines.batch import Batch


def memory() -> str:
    """Resident memory of this process."""
    return f"{psutil.Process().memory_info().rss / 1e9:.1f} GB"


def track(batches: Sequence[Batch], what: str) -> Iterator[Batch]:
    """Yield the batches, showing tokens per second, time left and memory on a terminal."""
    if not sys.stderr.isatty():
        yield from batches
        return
    from rich.console import Console
    from rich.progress import (
        BarColumn,
        Progress,
        TextColumn,
        TimeElapsedColumn,
        TimeRemainingColumn,
    )

    total = sum(int(b.mask.sum()) for b in batches)
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        TextColumn("{task.percentage:>3.0f}%"),
        TextColumn("{task.fields[rate]}"),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
        TextColumn("{task.fields[memory]}"),
    )
    with Progress(*columns, console=Console(stderr=True), transient=True) as progress:
        task = progress.add_task(what, total=total, rate="", memory=memory())
        for batch in batches:
            yield batch
            progress.advance(task, int(batch.mask.sum()))
            speed = progress.tasks[task].speed
            rate = f"{speed:,.0f} tokens/s" if speed else ""
            progress.update(task, rate=rate, memory=memory())
