"""For mkdocs: the pages of `eval/`, and their pictures, are pages of the site, too.

In the repository a page of `docs/` links to them as `../eval/LAB.md`, in the site as `eval/LAB.md`.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from mkdocs.structure.files import File, Files

ROOT = Path(__file__).parent.parent
OUTSIDE = [p for kind in ("*.md", "*.png") for p in sorted((ROOT / "eval").glob(kind))]


def on_files(files: Files, config: Any) -> Files:
    """Add them."""
    for path in OUTSIDE:
        name = path.relative_to(ROOT).as_posix()
        files.append(File.generated(config, name, abs_src_path=str(path)))
    return files


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    """Links to them, as they are in the site."""
    for path in OUTSIDE:
        name = path.relative_to(ROOT).as_posix()
        markdown = markdown.replace(f"](../{name}", f"]({name}")
    return markdown
