"""Gives lm-eval the items that lie beside this file, from whatever folder it is started in."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import datasets


def load(file: str, **_: Any) -> dict[str, datasets.Dataset]:
    """The lines of one JSONL file as the split `test`."""
    with (Path(__file__).parent / file).open(encoding="utf-8") as lines:
        return {"test": datasets.Dataset.from_list([json.loads(line) for line in lines])}
