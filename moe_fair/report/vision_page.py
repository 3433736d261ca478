"""What the pages of image runs share: style, tables, and pictures that lie in the page."""

from __future__ import annotations

import base64
import html
import io
from collections.abc import Sequence
from typing import Any

STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; max-width: 64rem; margin: 2rem auto; padding: 0 1rem;
       color: #1c1c1c; background: #fff }
h1 { font-size: 1.5rem } h2 { font-size: 1.15rem; margin-top: 2rem }
table { border-collapse: collapse } td, th { padding: .2rem .8rem; text-align: right }
td:first-child, th:first-child { text-align: left } thead th { border-bottom: 1px solid #888 }
img { max-width: 100% } .note { color: #555 }
"""


def table(header: Sequence[str], rows: Sequence[Sequence[Any]]) -> str:
    """Rows under a header, escaped."""
    head = "".join(f"<th>{html.escape(h)}</th>" for h in header)
    body = "".join(
        "<tr>" + "".join(f"<td>{html.escape(str(c))}</td>" for c in row) + "</tr>" for row in rows
    )
    return f"<table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>"


def axes(columns: int, *, height: float) -> tuple[Any, Any]:
    """A figure of a page's width and its axes, so many side by side."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, height), layout="constrained")
    return figure, figure.subplots(1, columns)


def image(figure: Any) -> str:
    """The figure as an element of the page."""
    stream = io.BytesIO()
    figure.savefig(stream, format="png", dpi=110)
    return f'<img src="data:image/png;base64,{base64.b64encode(stream.getvalue()).decode()}">'
