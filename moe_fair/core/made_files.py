"""Files that an earlier stage made: their names, and finding them before torch is imported."""

from __future__ import annotations

from pathlib import Path

STATISTICS_FILE = "statistics.safetensors"
# beside weights: loaders take every `*.safetensors` of a model, in its folders too, for weights
RESULT_FILE = "statistics.tensors"


def statistics_file(folder: Path) -> Path:
    """Where a folder keeps statistics: `calibrate`'s, a result's, or a result's of before."""
    file = folder / RESULT_FILE
    return file if file.is_file() else folder / STATISTICS_FILE


def find_statistics(path: Path) -> Path:
    """The statistics file that a path names: it, or the one in that folder.

    Raises:
        ValueError: there is none.
    """
    file = statistics_file(path) if path.is_dir() else path
    if not file.is_file():
        raise ValueError(
            f"no statistics at {path}; make them with `moe-fair calibrate MODEL -o {path}`"
        )
    return file


def find_plan(path: Path) -> Path:
    """The plan file that a path names.

    Raises:
        ValueError: there is none.
    """
    if not path.is_file():
        raise ValueError(f"no plan at {path}: `moe-fair plan STATISTICS -o {path}` makes one")
    return path
