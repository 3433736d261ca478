"""A document on the terminal, by rich: texts, tables and code; a picture by what it shows.

A name is only a name: controls in it are shown as escapes, and nothing in it is markup.
"""

from __future__ import annotations

from functools import singledispatch

import rich.text
from rich.console import Console
from rich.measure import Measurement
from rich.table import Table as Grid

from moe_fair.cli.terminal import console as new_console
from moe_fair.core.printable import printable
from moe_fair.report.document import Block, Code, Document, Figure, Table, Text, Tiles

MOST_COLUMNS = 1000  # of a table


def render(document: Document) -> None:
    """Print it, with a line between its sections."""
    console = new_console()
    if document.title:
        _heading(console, document.title)
        _line(console, printable(document.subtitle))
        console.print()
    for i, section in enumerate(document.sections):
        if i:
            console.print()
        if section.title:
            _heading(console, section.title)
        for block in section.blocks:
            _block(block, console)


def _heading(console: Console, title: str) -> None:
    console.print(rich.text.Text(printable(title), style="bold"), soft_wrap=True)


def _line(console: Console, text: str) -> None:
    console.print(text, soft_wrap=True)


@singledispatch
def _block(block: Block, console: Console) -> None:
    raise AssertionError(f"a block of unknown kind {type(block).__name__}")


@_block.register
def _(block: Text, console: Console) -> None:
    _line(console, ("note: " if block.note else "") + printable(block.text))


@_block.register
def _(block: Tiles, console: Console) -> None:
    _facts(console, tuple((t.label, t.value, t.detail) for t in block.tiles))


@_block.register
def _(block: Table, console: Console) -> None:
    if not block.header:
        _facts(console, block.rows)
        return
    grid = Grid(box=None, header_style="bold", pad_edge=False)
    for i, name in enumerate(block.header):
        grid.add_column(printable(name), justify="left" if i in block.words else "right",
                        no_wrap=True)  # fmt: skip
    for row in block.rows:
        grid.add_row(*map(printable, row))
    # a terminal that is too narrow breaks the lines; a pipe has no width: no number is cut short
    unbounded = console.options.update(width=MOST_COLUMNS)
    width = console.width
    console.width = max(width, Measurement.get(console, unbounded, grid).maximum)
    console.print(grid)
    console.width = width


@_block.register
def _(block: Figure, console: Console) -> None:
    _line(console, f"picture: {printable(block.alt)}")


@_block.register
def _(block: Code, console: Console) -> None:
    _line(console, block.text)


def _facts(console: Console, rows: tuple[tuple[str, ...], ...]) -> None:
    """Names and what they are, which may take lines."""
    grid = Grid(box=None, show_header=False, pad_edge=False)
    for _ in range(max(map(len, rows), default=0)):
        grid.add_column(overflow="fold")
    for row in rows:
        grid.add_row(*map(printable, row))
    console.print(grid)
