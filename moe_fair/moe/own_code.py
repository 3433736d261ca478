"""The modeling file that travels inside a checkpoint, and telling it from anybody else's code."""

from __future__ import annotations

import json
import re
from collections.abc import Collection
from pathlib import Path

TEMPLATE = Path(__file__).with_name("modeling_pruned.py")
MODELING_FILE = "modeling_moe_fair.py"
MODELING_CLASS = "MoeFairForCausalLM"
REFERENCE = f"{MODELING_FILE[:-3]}.{MODELING_CLASS}"  # as `auto_map` writes it
STOCK_IMPORT = re.compile(r"^from transformers[\w.]* import \w+ as StockModel$", re.MULTILINE)


def modeling_source(stock: type) -> str:
    """The text of the modeling file for a checkpoint of this stock class."""
    line = f"from {stock.__module__} import {stock.__name__} as StockModel"
    text, count = STOCK_IMPORT.subn(line, TEMPLATE.read_text())
    assert count == 1, "the template has one line that imports the stock class"
    assert STOCK_IMPORT.search(text), line
    return text


def is_ours(folder: Path, readers: Collection[str] = ()) -> bool:
    """The only code that a checkpoint brings is our modeling file, letter for letter.

    Args:
        readers: code files of its tokenizer that are looked at elsewhere: those that name them and
            the entries of `auto_map` that lead to them are passed over.

    Only the line that imports the stock class may differ, and only within transformers. A tokenizer
    or adapter that names code or a base model of its own makes the checkpoint somebody else's.
    """
    config = json.loads((folder / "config.json").read_text())
    brought = config.get("auto_map")
    if not isinstance(brought, dict):
        return False
    modules = {Path(r).with_suffix("").as_posix().replace("/", ".") for r in readers}
    others = {v for v in brought.values() if str(v).rpartition(".")[0] not in modules}
    if others != {REFERENCE} or (folder / "adapter_config.json").exists():
        return False
    if not readers and any(map(_names_code, folder.glob("*.json"))):
        return False
    file = folder / MODELING_FILE
    if not file.is_file():
        return False
    return _without_import(file.read_text()) == _without_import(TEMPLATE.read_text())


def _names_code(file: Path) -> bool:
    """A JSON file other than the model's config that points to code, as tokenizers may."""
    if file.name in ("config.json", "tokenizer.json") or file.name.endswith(".index.json"):
        return False
    try:
        content = json.loads(file.read_text())
    except ValueError:
        return True  # what cannot be read is not vouched for
    return isinstance(content, dict) and "auto_map" in content


def _without_import(text: str) -> str:
    return STOCK_IMPORT.sub("", text)
