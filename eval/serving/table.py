"""Rows of a check as a table: `python eval/serving/table.py ROWS.jsonl`."""

from __future__ import annotations

import json
import sys
from pathlib import Path

HEADER = (
    "family", "checkpoint", "engine", "NLL there", "in transformers", "difference", "same greedy",
)  # fmt: skip


def main() -> None:
    """Print it."""
    print(f"| {' | '.join(HEADER)} |")
    print("|---" * len(HEADER) + "|")
    for line in Path(sys.argv[1]).read_text().splitlines():
        r = json.loads(line)
        there, here = r["nll"], r["transformers"]
        cells = (
            r["family"], r["which"], r["engine"], f"{there:.6f}", f"{here:.6f}",
            f"{abs(there - here):.1e}", "yes" if r["greedy_equal"] else "no",
        )  # fmt: skip
        print(f"| {' | '.join(cells)} |")


if __name__ == "__main__":
    main()
