"""A report as data: sections of texts, tables, figures and code. Nothing here knows experts.

`html`, `markdown` and the terminal (`cli.render`) each render any document.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Text:
    """A paragraph; with `note` it stands out."""

    text: str
    note: bool = False


@dataclass(frozen=True)
class Tile:
    """One number that a reader looks for first: a label, a value, and what to read it against."""

    label: str
    value: str
    detail: str = ""


@dataclass(frozen=True)
class Tiles:
    """Tiles in a row."""

    tiles: tuple[Tile, ...]


@dataclass(frozen=True)
class Table:
    """Rows of cells.

    Attributes:
        header: names of the columns; without any the rows are facts: a name and what it is.
        words: the columns of words, which are left-aligned; numbers stand to the right.
    """

    header: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    words: tuple[int, ...] = (0,)


@dataclass(frozen=True)
class Figure:
    """A picture.

    Attributes:
        name: its file name without suffix, where it becomes a file.
        png: the bytes.
        alt: what it shows, for those who cannot see it.
        caption: how to read it.
    """

    name: str
    png: bytes
    alt: str
    caption: str


@dataclass(frozen=True)
class Code:
    """Text with its own line breaks: a recipe, a command."""

    text: str
    language: str = ""


Block = Text | Tiles | Table | Figure | Code


@dataclass(frozen=True)
class Section:
    """A heading, which may be empty, and what stands below it."""

    title: str
    blocks: tuple[Block, ...]


@dataclass(frozen=True)
class Document:
    """A whole report, or what a command prints at its end, which has no headings."""

    title: str
    subtitle: str
    sections: tuple[Section, ...]

    def figures(self) -> Sequence[Figure]:
        """All figures in order."""
        return [b for s in self.sections for b in s.blocks if isinstance(b, Figure)]


def screen(*parts: Iterable[Block]) -> Document:
    """What a command prints: parts without headings, a line between them."""
    return Document("", "", tuple(Section("", tuple(blocks)) for blocks in parts))
