"""What a run writes: refused if in use, filled beside its final name, renamed when whole."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any


def check_output(path: Path) -> None:
    """The directory can be written.

    Raises:
        ValueError: it is a file, or a directory with something in it.
    """
    if path.exists() and not path.is_dir():
        raise ValueError(f"output {path} is a file; give a new or empty directory")
    if path.is_dir() and any(path.iterdir()):
        raise ValueError(f"output directory {path} is not empty; give another, or remove it first")


def partial_path(path: Path) -> Path:
    """The sibling in which a run works until it is whole."""
    return path.with_name(path.name + ".partial")


def write_whole(path: Path, text: str) -> None:
    """Write a text file, whole or not at all; its folder is made where there is none."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = partial_path(path)
    partial.write_text(text, encoding="utf-8")
    partial.replace(path)


def digest(key: Mapping[str, Any]) -> str:
    """Hex digest of what a stored result depends on, by which a later run knows its own."""
    return hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()


def fresh(folder: Path) -> Path:
    """An empty directory; what an interrupted run left there goes."""
    if folder.exists():
        shutil.rmtree(folder)
    folder.mkdir(parents=True)
    return folder


def settle(folder: Path, output: Path) -> None:
    """Give a whole result its final name."""
    if output.exists():
        output.rmdir()  # empty: `check_output` saw to it
    folder.rename(output)
