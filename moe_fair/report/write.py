"""Writing reports."""

from __future__ import annotations

from pathlib import Path

from moe_fair.core.output import write_named
from moe_fair.report import html, markdown
from moe_fair.report.document import Document
from moe_fair.report.moe import document
from moe_fair.report.sources import FOLDER, gather
from moe_fair.version import __version__

FORMATS = ("html", "md")
FOOTER = f"Written by moe_fair {__version__}."


def write_report(output: Path, format: str = "html", path: Path | None = None) -> Path:
    """The report of a pruned language model.

    Args:
        output: the directory that `prune` wrote.
        path: where the report goes; by default `moe_fair/report.html` or `.md` in it.

    Returns:
        the file written.

    Raises:
        ValueError: an unknown format, or not a pruned checkpoint.
    """
    if format not in FORMATS:
        raise ValueError(f"--format {format!r} is none of {', '.join(FORMATS)}")
    made = document(gather(output))
    return write_document(made, path or output / FOLDER / f"report.{format}", format)


def write_document(made: Document, path: Path, format: str = "html") -> Path:
    """A document as one HTML file, or as Markdown with its pictures beside.

    Returns:
        the file written.

    Raises:
        ValueError: the path is a directory, or pictures cannot lie beside it.
    """
    if path.is_dir():
        raise ValueError(f"{path} is a directory; name the file to write")
    if format == "md" and path.exists() and not path.is_file():
        raise ValueError(f"{path} is no file, and Markdown has its pictures beside it; name a file")
    if format == "md" and path.is_symlink():
        path = path.resolve()  # with the pictures
    path.parent.mkdir(parents=True, exist_ok=True)
    if format == "html":
        text = html.render(made, FOOTER)
    else:
        pictures = path.with_name(path.stem + "-figures")
        pictures.mkdir(exist_ok=True)
        for figure in made.figures():
            (pictures / f"{figure.name}.png").write_bytes(figure.png)
        text = markdown.render(made, FOOTER, pictures.name)
    write_named(path, text)
    return path
