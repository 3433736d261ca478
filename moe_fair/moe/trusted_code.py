"""The modeling file that travels inside a checkpoint, and telling it from anybody else's code.

A folder whose code is ours is loaded with `trust_remote_code`, unasked, and then transformers runs
more than the modeling file: `custom_generate/generate.py`, whatever `auto_map` of a tokenizer or a
processor names, an adapter's base model. So a folder is ours as a whole or not at all.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from moe_fair.core.manifest import FOLDER, MANIFEST, listed_files, sha256

TEMPLATE = Path(__file__).with_name("modeling_pruned.py")
MODELING_FILE = "modeling_moe_fair.py"
MODELING_CLASS = "MoeFairForCausalLM"
REFERENCE = f"{MODELING_FILE[:-3]}.{MODELING_CLASS}"  # as `auto_map` writes it
# the same for mlx-lm, which `model_file` of the config names and mlx-lm alone runs
MLX_TEMPLATE = Path(__file__).with_name("mlx_unequal.py")
MLX_FILE = "mlx_moe_fair.py"
OUR_FILES = (MODELING_FILE, MLX_FILE)
# from transformers' own modules alone: `transformers_modules` is where it keeps others' code
STOCK_IMPORT = re.compile(
    r"^from transformers(?:\.\w+)* import \w+ as StockModel$", re.MULTILINE | re.ASCII
)
# sha256 of every template that checkpoints were ever written from, without the line of the import;
# who changes the template adds its own: what was written before must load as it did
RELEASED = frozenset(
    (
        "f4001ce061248a64bc1a4cc85788090f04347035bcd954398a6d7d4db4c38fcf",
        "4dab3504b84ed72bc0eab93575c94fbb855715e2514602d66f1359ae7c0a99b2",
        "3f2f7d5526590745d5cff264302892f16d94d334c54d6a76ad0aa1fb163c444c",
        "fb888d3c0fc387a5ffee4e61732beb7ef5dd9319e5f48594c8af6bc1a27d1a7e",
        "ca21e20a15c4d519048e8c79139328283da39292818657cef791f7bea7a2a146",
        "1656940229fbf3e670445d8d0a94da04f3c833dcf2435ee7c01f026d8df7c8c5",
    )
)
# the same of every file for mlx-lm
RELEASED_MLX = frozenset(
    (
        "ca3551247960d28a676ea613c445a5ea8cf996c63d06e62425733978f78a6bdb",
        "24280f9bc27d08a40763ede28fd8dc133180526eb6a688bc87c9ef82b6b8173b",
    )
)
# what Python or torch runs, wherever in a folder it lies
CODE = (
    ".py", ".pyc", ".pyo", ".pyw", ".so", ".pyd", ".dll", ".dylib",
    ".bin", ".pt", ".pth", ".ckpt", ".pkl", ".pickle",
)  # fmt: skip
NAMING = ("auto_map", "custom_pipelines")  # keys by which a JSON file names code to be run
IMPLEMENTATION = ("attn_implementation", "experts_implementation")
# large tables that nobody looks for code in
TABLES = ("tokenizer.json", ".index.json")


def modeling_source(stock: type) -> str:
    """The text of the modeling file for a checkpoint of this stock class.

    Raises:
        ValueError: the class is not one of transformers' own.
    """
    line = f"from {stock.__module__} import {stock.__name__} as StockModel"
    if not STOCK_IMPORT.fullmatch(line):
        raise ValueError(
            f"layers of different sizes need a class of transformers' own to build on, and "
            f"{stock.__name__} is of {stock.__module__}; use --allocate uniform"
        )
    text, count = STOCK_IMPORT.subn(line, TEMPLATE.read_text(encoding="utf-8"))
    assert count == 1, "the template has one line that imports the stock class"
    return text


def template_digest(text: str) -> str:
    """Hex sha256 of a modeling file without the line that imports the stock class."""
    return hashlib.sha256(STOCK_IMPORT.sub("", text).encode()).hexdigest()


def code_files(folder: Path) -> list[str]:
    """Names, from the folder, of all files in it that Python or torch would run.

    Raises:
        ValueError: a link to a folder, which would have to be looked into as well.
    """
    found = []
    for path in sorted(folder.rglob("*")):
        if path.is_symlink() and path.is_dir():
            raise ValueError(f"{path.relative_to(folder)} is a link to another folder")
        if path.suffix.lower() in CODE:
            found.append(path.relative_to(folder).as_posix())
    return found


def not_ours(folder: Path) -> str:
    """What makes a checkpoint's code somebody else's, in a line; empty where it is ours.

    Only the line that imports the stock class may differ, and only within transformers. Where there
    is a manifest it must list the modeling file as it is; results of before there were manifests
    have none, nor have those that transformers has saved again.
    """
    try:
        config = json.loads((folder / "config.json").read_bytes())
        named = {*config["auto_map"].values()} <= {REFERENCE}
        if not named or config.get("model_file", MLX_FILE) != MLX_FILE:
            return "config.json names code that is not moe_fair's"
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return "config.json names no code of moe_fair's"
    try:
        others = [name for name in code_files(folder) if name not in OUR_FILES]
    except ValueError as e:
        return str(e)
    if others:
        return f"{others[0]} is code that moe_fair does not write"
    if (folder / "adapter_config.json").exists():
        return "adapter_config.json names a model of its own"
    if namer := naming_file(folder):
        return f"{namer} names code to be run, or cannot be read"
    return changed(folder)


def changed(folder: Path) -> str:
    """What is wrong with our own files themselves, in a line; empty where they are released ones.

    That for mlx-lm may be missing: earlier results have none.
    """
    file = folder / MODELING_FILE
    brought = [n for n in OUR_FILES if n == MODELING_FILE or (folder / n).exists()]
    try:
        for name in brought:
            if not _released(name, (folder / name).read_bytes()):
                return f"{name} is not as any version of moe_fair writes it"
        listed = listed_files(folder) if (folder / MANIFEST).exists() else None
    except (OSError, ValueError) as e:
        return str(e) if file.is_file() else f"{MODELING_FILE} is missing"
    for name in brought:
        if listed is None:
            break
        if name not in listed or listed[name]["sha256"] != sha256(folder / name):
            return f"{name} is not the one that {MANIFEST} lists"
    return ""


def _released(name: str, content: bytes) -> bool:
    if name == MLX_FILE:
        return hashlib.sha256(content).hexdigest() in RELEASED_MLX
    return template_digest(content.decode("utf-8")) in RELEASED


def naming_file(folder: Path) -> str:
    """A JSON file that names code to be run, but for the model's own `auto_map`; empty for none."""
    return next((n for n in _json_files(folder) if _names_code(folder / n)), "")


def _json_files(folder: Path) -> list[str]:
    names = (p.relative_to(folder) for p in sorted(folder.rglob("*")))
    return [
        n.as_posix()
        for n in names
        if n.suffix.lower() == ".json" and n.parts[0] != FOLDER and not n.name.endswith(TABLES)
    ]


def named_kernel(folder: Path) -> str:
    """The Hub's kernel that a config asks attention of, which transformers fetches and runs."""
    try:
        config = json.loads((folder / "config.json").read_bytes())
    except (ValueError, RecursionError):
        return ""  # told where the config is read
    return next(_kernels(config), "")


def _kernels(value: Any, within: bool = False) -> Iterator[str]:
    if isinstance(value, dict):
        for key, inner in value.items():
            yield from _kernels(inner, within or str(key).endswith(IMPLEMENTATION))
    elif isinstance(value, list):
        for inner in value:
            yield from _kernels(inner, within)
    elif within and isinstance(value, str) and "/" in value:
        yield value


def _names_code(file: Path) -> bool:
    """A JSON file points to code, as tokenizers may; what cannot be read is not vouched for."""
    try:
        content = json.loads(file.read_bytes())
        if file.name == "config.json" and isinstance(content, dict):
            content.pop("auto_map", None)  # looked at before
        return _holds_name(content)
    except (OSError, ValueError, RecursionError):
        return True


def _holds_name(value: Any) -> bool:
    if isinstance(value, dict):
        # a vocabulary may hold such a token: its value is a number
        named = [k in NAMING and isinstance(v, (dict, list, str)) for k, v in value.items()]
        return any(named) or any(map(_holds_name, value.values()))
    return isinstance(value, list) and any(map(_holds_name, value))
