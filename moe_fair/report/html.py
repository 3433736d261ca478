"""A document as one self-contained HTML page: no script, no request, pictures inside.

Every text is escaped, controls in it are shown as such, and the page's own policy forbids loading
anything, so that a model's or a file's name cannot do more than be read.
"""

from __future__ import annotations

import base64
import html
import struct
from collections.abc import Sequence
from functools import singledispatch

from moe_fair.core.printable import printable
from moe_fair.report.document import Block, Code, Document, Figure, Section, Table, Text, Tiles

POLICY = "default-src 'none'; img-src data:; style-src 'unsafe-inline'; form-action 'none'"
STYLE = """
:root { color-scheme: light; }
* { box-sizing: border-box; }
body { margin: 0; background: #f6f7f9; color: #1d2430; line-height: 1.55;
  font: 16px/1.55 system-ui, -apple-system, "Segoe UI", Roboto, "DejaVu Sans", sans-serif; }
main { max-width: 1120px; margin: 0 auto; padding: 24px 20px 64px; }
h1 { font-size: 1.7rem; line-height: 1.25; margin: 8px 0 4px; overflow-wrap: anywhere; }
h2 { font-size: 1.2rem; margin: 0 0 10px; }
.subtitle { color: #566174; margin: 0 0 20px; overflow-wrap: anywhere; }
section { background: #fff; border: 1px solid #e1e5eb; border-radius: 10px;
  padding: 18px 20px; margin: 16px 0; }
p { margin: 8px 0; max-width: 75ch; overflow-wrap: anywhere; }
.note { border-left: 4px solid #d08b1d; background: #fdf6e8; padding: 8px 12px; max-width: none; }
.tiles { display: grid; gap: 12px; grid-template-columns: repeat(auto-fit, minmax(150px, 1fr)); }
.tile { border: 1px solid #e1e5eb; border-radius: 8px; padding: 10px 14px; }
.tile .label { color: #566174; font-size: .85rem; }
.tile .value { font-size: 1.35rem; font-weight: 600; font-variant-numeric: tabular-nums; }
.tile .detail { color: #566174; font-size: .85rem; overflow-wrap: anywhere; }
.scroll { overflow-x: auto; margin: 10px 0; background:
  linear-gradient(to right, #fff 20px, transparent) left / 40px 100% no-repeat local,
  linear-gradient(to left, #fff 20px, transparent) right / 40px 100% no-repeat local,
  linear-gradient(to right, #0003, transparent) left / 10px 100% no-repeat scroll,
  linear-gradient(to left, #0003, transparent) right / 10px 100% no-repeat scroll; }
table { border-collapse: collapse; font-size: .92rem; font-variant-numeric: tabular-nums; }
th, td { padding: 5px 14px 5px 0; text-align: right; white-space: nowrap; }
.words { text-align: left; white-space: pre; }
thead th { border-bottom: 2px solid #c9d0da; color: #566174; font-weight: 600; }
tbody tr + tr td { border-top: 1px solid #eceff3; }
figure { margin: 14px 0 4px; }
figure img { display: block; height: auto; max-width: 100%; }
figcaption { color: #566174; font-size: .9rem; margin-top: 6px; max-width: 90ch; }
code { background: #f3f5f8; border-radius: 4px; padding: 1px 4px; font-size: .9em; }
pre { background: #f3f5f8; border-radius: 8px; padding: 12px 14px; overflow-x: auto;
  font-size: .85rem; line-height: 1.45; margin: 10px 0; }
footer { color: #566174; font-size: .85rem; margin-top: 20px; }
@media (max-width: 640px) {
  main { padding: 14px 10px 40px; }
  section { padding: 14px 12px; border-radius: 8px; }
  table { font-size: .86rem; }
  th, td { padding-right: 9px; }
  figcaption::after { content: " The picture is wider than this screen: scroll it sideways."; }
}
"""
# a figure wider than the screen keeps at least this width on a phone, and scrolls
LEAST_WIDTH = 760


def render(document: Document, footer: str) -> str:
    """The page."""
    body = "\n".join(_section(s) for s in document.sections)
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        f'<meta http-equiv="Content-Security-Policy" content="{escape(POLICY)}">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        '<meta name="referrer" content="no-referrer">\n'
        # browsers ask the server for an icon unless the page brings one
        '<link rel="icon" href="data:,">\n'
        f"<title>{escape(document.title)}</title>\n<style>{STYLE}</style>\n</head>\n<body>\n"
        f"<main>\n{_heading(document)}{body}\n<footer>{escape(footer)}</footer>\n"
        "</main>\n</body>\n</html>\n"
    )


def escape(text: str) -> str:
    """One line of text, of which nothing is markup and nothing moves the rest."""
    return html.escape(printable(text))


def _heading(document: Document) -> str:
    if not document.title:
        return ""
    return (
        f'<h1>{escape(document.title)}</h1>\n<p class="subtitle">{escape(document.subtitle)}</p>\n'
    )


def _section(section: Section) -> str:
    blocks = "\n".join(_block(b) for b in section.blocks)
    title = f"<h2>{escape(section.title)}</h2>\n" if section.title else ""
    return f"<section>\n{title}{blocks}\n</section>"


@singledispatch
def _block(block: Block) -> str:
    raise AssertionError(f"a block of unknown kind {type(block).__name__}")


@_block.register
def _(block: Text) -> str:
    # what stands between backquotes is code; the pieces are escaped one by one
    parts = [escape(part) for part in block.text.split("`")]
    text = "".join(f"<code>{p}</code>" if i % 2 else p for i, p in enumerate(parts))
    return f'<p class="note">{text}</p>' if block.note else f"<p>{text}</p>"


@_block.register
def _(block: Tiles) -> str:
    tiles = (
        f'<div class="tile"><div class="label">{escape(t.label)}</div>'
        f'<div class="value">{escape(t.value)}</div>'
        f'<div class="detail">{escape(t.detail)}</div></div>'
        for t in block.tiles
    )
    return f'<div class="tiles">{"".join(tiles)}</div>'


@_block.register
def _(block: Table) -> str:
    def cells(row: Sequence[str], tag: str, more: str = "") -> str:
        kinds = (' class="words"' if i in block.words else "" for i in range(len(row)))
        return "".join(
            f"<{tag}{more}{kind}>{escape(c)}</{tag}>" for c, kind in zip(row, kinds, strict=True)
        )

    head = cells(block.header, "th", ' scope="col"')
    rows = "".join(f"<tr>{cells(row, 'td')}</tr>" for row in block.rows)
    return (
        '<div class="scroll" tabindex="0"><table>'
        + (f"<thead><tr>{head}</tr></thead>" if block.header else "")
        + f"<tbody>{rows}</tbody></table></div>"
    )


@_block.register
def _(block: Figure) -> str:
    width, height = png_size(block.png)
    data = base64.b64encode(block.png).decode("ascii")
    # half of the pixels: sharp on screens of double density
    shown = width // 2
    return (
        f'<figure><div class="scroll" tabindex="0"><img src="data:image/png;base64,{data}" '
        f'alt="{escape(block.alt)}" width="{shown}" height="{height // 2}" '
        f'style="min-width:{min(shown, LEAST_WIDTH)}px"></div>'
        f"<figcaption>{escape(block.caption)}</figcaption></figure>"
    )


@_block.register
def _(block: Code) -> str:
    text = "\n".join(map(escape, block.text.split("\n")))
    return f'<pre tabindex="0">{text}</pre>'


def png_size(png: bytes) -> tuple[int, int]:
    """Width and height of a PNG in pixels, from its header."""
    width, height = struct.unpack(">II", png[16:24])
    return width, height
