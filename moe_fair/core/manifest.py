"""The list of a result's files with their sizes and hashes, and whether they still are so."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable
from fnmatch import fnmatch
from pathlib import Path, PurePosixPath

from moe_fair.core.output import write_whole

FOLDER = "moe_fair"  # inside a pruned checkpoint
MANIFEST = f"{FOLDER}/manifest.json"
MANIFEST_FORMAT = "moe_fair.manifest/1"
REDRAWN = (f"{FOLDER}/report.html", f"{FOLDER}/report.md")  # drawn from the other files
MODEL_CARD = "README.md"
# written after the list: the card, results of `eval`, reports drawn anew with their pictures
WRITTEN_LATER = (
    MODEL_CARD, *REDRAWN, f"{FOLDER}/report-figures/*.png",
    *(f"{FOLDER}/{n}" for n in ("heldout.json", "benchmarks.json", "agreement.json", "lm-eval/*")),
)  # fmt: skip
# what a loader would run or read in place of what is listed, or beside it
LOADED = (
    ".py", ".pyc", ".so", ".safetensors", ".bin", ".pt", ".pth", ".ckpt", ".pkl", ".gguf",
    ".json", ".jinja", ".model", ".tiktoken", "merges.txt", "vocab.txt",
)  # fmt: skip
CHUNK = 16 * 2**20


def write_manifest(folder: Path) -> Path:
    """List every file of a result with its size and sha256, but for the reports, drawn from them.

    Returns:
        the manifest's path.
    """
    files = {
        name: {"bytes": path.stat().st_size, "sha256": sha256(path)}
        for path in sorted(p for p in folder.rglob("*") if p.is_file())
        if (name := path.relative_to(folder).as_posix()) not in (*REDRAWN, MANIFEST)
    }
    text = json.dumps({"format": MANIFEST_FORMAT, "files": files}, indent=1) + "\n"
    path = folder / MANIFEST
    write_whole(path, text)
    return path


def sha256(path: Path) -> str:
    """Hex digest of a file, read in pieces."""
    digest = hashlib.sha256()
    with path.open("rb") as f:
        while chunk := f.read(CHUNK):
            digest.update(chunk)
    return digest.hexdigest()


def check_files(output: Path, *, hashes: bool = True) -> str:
    """Every listed file is there, whole and unchanged, and nothing that would be loaded is new.

    Args:
        hashes: read every file again for its sha256; otherwise sizes alone.

    Returns:
        what was found, in a line.

    Raises:
        ValueError: the first thing that is wrong.
    """
    path = output / MANIFEST
    if not path.is_file():
        raise ValueError(
            f"no {MANIFEST}: removed, or pruned by an earlier version; `moe-fair verify {output} "
            "--against ORIGINAL --write` compares it with the original and writes the list"
        )
    listed = listed_files(output)
    for name, entry in listed.items():
        file = output / name
        if not file.is_file():
            raise ValueError(f"{name} is missing")
        size = file.stat().st_size
        if size != entry["bytes"]:
            raise ValueError(f"{name} has {size:,} bytes and had {entry['bytes']:,}")
        if hashes and sha256(file) != entry["sha256"]:
            raise ValueError(f"{name} is not as it was written (sha256)")
    beside = unlisted(output, listed)
    for name in beside:
        if name.lower().endswith(LOADED):
            raise ValueError(f"{name} was not there when the checkpoint was written")
    size = sum(e["bytes"] for e in listed.values())
    how = "as they were written (sha256)" if hashes else "listed with their sha256"
    text = f"{len(listed)} files, {size:,} bytes, {how}"
    return text + (f"; beside them, not listed: {', '.join(beside)}" if beside else "")


def unlisted(output: Path, listed: Iterable[str]) -> list[str]:
    """Names of the files in a result that neither its list names nor moe_fair writes after it.

    Of a folder that is a link, the name of the link; a folder without any listed file is named as
    one, unless it holds something that would be loaded.
    """
    listed = {*listed, MANIFEST}
    folders = {parent.as_posix() for name in listed for parent in PurePosixPath(name).parents}
    found: dict[str, None] = {}
    for path in sorted(output.rglob("*")):
        name = path.relative_to(output).as_posix()
        if path.is_dir() and not path.is_symlink():
            continue
        if name in listed or any(fnmatch(name, p) for p in WRITTEN_LATER):
            continue
        top = name.split("/")[0]
        inert = top not in folders and "/" in name and not name.lower().endswith(LOADED)
        found[f"{top}/" if inert else name] = None
    return list(found)


def same_bytes(a: Path, b: Path) -> bool:
    """Two files hold the same, read in pieces."""
    if a.stat().st_size != b.stat().st_size:
        return False
    with a.open("rb") as f, b.open("rb") as g:
        while chunk := f.read(CHUNK):
            if chunk != g.read(CHUNK):
                return False
    return True


def listed_files(folder: Path) -> dict[str, dict]:
    """Name -> bytes and sha256, as a folder's manifest has them.

    Raises:
        ValueError: it is not a list of files in that folder.
    """
    try:
        raw = json.loads((folder / MANIFEST).read_bytes())
        if raw["format"] != MANIFEST_FORMAT:
            raise ValueError(f"format {raw['format']!r}, expected {MANIFEST_FORMAT!r}")
        for name, entry in raw["files"].items():
            parts = PurePosixPath(name)
            if parts.is_absolute() or ".." in parts.parts or "\0" in name:
                raise ValueError(f"{name!r} lies outside the checkpoint")
            if not isinstance(entry["bytes"], int) or not isinstance(entry["sha256"], str):
                raise ValueError(f"{name!r} has no size and sha256")
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as e:
        raise ValueError(f"{MANIFEST} is not a list of files: {e}") from e
    return raw["files"]


def check_result(output: Path) -> None:
    """The directory is one that `prune` wrote, of a language model or an image classifier.

    Raises:
        ValueError: it is not.
    """
    if not any((output / name).is_file() for name in (f"{FOLDER}/plan.json", "pruned.json")):
        raise ValueError(
            f"{output}: no {FOLDER}/plan.json in it; give a directory that `moe-fair prune` wrote"
        )
