"""A document as Markdown; its pictures are files beside it."""

from __future__ import annotations

import re
from functools import singledispatch

from moe_fair.core.printable import printable
from moe_fair.report.document import Block, Code, Document, Figure, Table, Text, Tiles

_SPECIAL = re.compile(r"([\\`*_{}\[\]<>#|~$])")


def render(document: Document, footer: str, pictures: str) -> str:
    """The text; a figure is linked as `PICTURES/NAME.png`."""
    parts = [f"# {plain(document.title)}", plain(document.subtitle)] if document.title else []
    for section in document.sections:
        if section.title:
            parts.append(f"## {plain(section.title)}")
        parts += [_block(b, pictures) for b in section.blocks]
    return "\n\n".join([*parts, plain(footer)]) + "\n"


def plain(text: str, strip: bool = True) -> str:
    """Text on one line that Markdown and the HTML in it leave alone."""
    text = printable(" ".join(text.split()) if strip else text)
    return _SPECIAL.sub(r"\\\1", text.replace("&", "&amp;"))


def table(block: Table) -> str:
    """A table, words to the left, numbers to the right."""
    header = block.header or ("",) * max(map(len, block.rows), default=0)
    sides = ["---" if i in block.words else "---:" for i in range(len(header))]
    rows = [[plain(c) for c in header], sides, *[[_cell(c) for c in r] for r in block.rows]]
    return "\n".join(f"| {' | '.join(r)} |" for r in rows)


def fenced(text: str, language: str = "") -> str:
    """Code between fences longer than any in it."""
    longest = max((len(run) for run in re.findall(r"`+", text)), default=0)
    fence = "`" * max(3, longest + 1)
    text = "\n".join(map(printable, text.rstrip().split("\n")))
    return f"{fence}{language}\n{text}\n{fence}"


def _cell(text: str) -> str:
    indent = len(text) - len(text.lstrip(" "))
    return "&nbsp;" * indent + plain(text)


@singledispatch
def _block(block: Block, pictures: str) -> str:
    raise AssertionError(f"a block of unknown kind {type(block).__name__}")


@_block.register
def _(block: Text, pictures: str) -> str:
    # what stands between backquotes is code
    parts = printable(" ".join(block.text.split())).split("`")
    text = "".join(f"`{p}`" if i % 2 else plain(p, False) for i, p in enumerate(parts))
    return f"> {text}" if block.note else text


@_block.register
def _(block: Tiles, pictures: str) -> str:
    rows = tuple((t.label, t.value, t.detail) for t in block.tiles)
    return table(Table(("", "value", ""), rows))


@_block.register
def _(block: Table, pictures: str) -> str:
    return table(block)


@_block.register
def _(block: Figure, pictures: str) -> str:
    return f"![{plain(block.alt)}]({pictures}/{block.name}.png)\n\n{plain(block.caption)}"


@_block.register
def _(block: Code, pictures: str) -> str:
    return fenced(block.text, block.language)
