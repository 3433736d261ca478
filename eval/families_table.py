"""The table of model families in docs/models.md, from `eval/families.json`.

What that file says is asserted by tests/moe/test_families.py and its neighbours, which walk over
transformers' own registry; a test also keeps that page equal to this table.

    python eval/families_table.py           # print it
    python eval/families_table.py --write   # put it into docs/models.md
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
PAGE = HERE.parent / "docs" / "models.md"
RECORD = HERE / "families.json"
START, END = "<!-- families: eval/families_table.py -->\n", "<!-- end of families -->"


def table(record: dict[str, Any]) -> str:
    """The table in Markdown."""
    own, multimodal = set(record["own_file"]), set(record["multimodal"])
    rows = [
        ("passed", _names(set(record["served"]) - own - multimodal)),
        ("passed, by a file of its own in `moe_fair/moe/families/`", _names(own - multimodal)),
        ("passed, multimodal: the language model is pruned", _names(multimodal)),
        ("passed, but layers hand on more than hidden states: only `--engine resident`",
         _names(record["resident_only"])),
    ]  # fmt: skip
    rows += [
        (f"before transformers {version}: only `--engine resident`", _names(kinds))
        for version in sorted(set(record["streamed_from"].values()))
        if (kinds := [k for k, v in record["streamed_from"].items() if v == version])
    ]
    rows += [
        (f"passed from transformers {old['transformers']} on, refused before: {old['why']}",
         _names([kind])) for kind, old in record["served_from"].items()
    ]  # fmt: skip
    rows += [(f"refused: {why['why']}", _names([kind])) for kind, why in record["refused"].items()]
    lines = [f"| transformers {record['transformers']} | model types |", "|---|---|"]
    return "\n".join([*lines, *(f"| {what} | {names} |" for what, names in rows)]) + "\n"


def _names(kinds: Iterable[str]) -> str:
    return ", ".join(f"`{k}`" for k in sorted(kinds))


def replaced(page: str, new: str) -> str:
    """The page with this table between its two marks."""
    before, _, rest = page.partition(START)
    _, _, after = rest.partition(END)
    assert after, f"docs/models.md has no {START.strip()} ... {END}"
    return before + START + new + END + after


def main() -> None:
    """Print the table, or write it."""
    parser = argparse.ArgumentParser(description="The table of model families in docs/models.md.")
    parser.add_argument("--write", action="store_true", help="into docs/models.md")
    text = table(json.loads(RECORD.read_text()))
    if parser.parse_args().write:
        PAGE.write_text(replaced(PAGE.read_text(), text))
    else:
        print(text, end="")


if __name__ == "__main__":
    main()
