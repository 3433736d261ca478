"""A file that a command is to write."""

from __future__ import annotations

import os
from pathlib import Path


def check_file(file: Path) -> None:
    """The file can be written.

    Raises:
        ValueError: it cannot; says why.
    """
    if file.is_symlink() or (file.exists() and not file.is_file()):
        raise ValueError(f"-o {file} is a folder, a link or a device; give the name of a file")
    if not file.parent.is_dir() or not os.access(file.parent, os.W_OK | os.X_OK):
        raise ValueError(
            f"-o {file}: {file.parent} is no folder that can be written; write elsewhere"
        )
