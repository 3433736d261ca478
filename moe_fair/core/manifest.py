"""The list of a result's files with their sizes and hashes, and whether they still are so."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path, PurePosixPath

from moe_fair.core.output import write_whole

FOLDER = "moe_fair"  # inside a pruned checkpoint
MANIFEST = f"{FOLDER}/manifest.json"
MANIFEST_FORMAT = "moe_fair.manifest/1"
REDRAWN = (f"{FOLDER}/report.html", f"{FOLDER}/report.md")  # drawn from the other files
# what a loader would run or read in place of what is listed
LOADED = (".py", ".safetensors", ".bin", ".pt", ".pth", ".ckpt", ".pkl", ".index.json")
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
    listed = _read(path)
    for name, entry in listed.items():
        file = output / name
        if not file.is_file():
            raise ValueError(f"{name} is missing")
        size = file.stat().st_size
        if size != entry["bytes"]:
            raise ValueError(f"{name} has {size:,} bytes and had {entry['bytes']:,}")
        if hashes and sha256(file) != entry["sha256"]:
            raise ValueError(f"{name} is not as it was written (sha256)")
    for file in sorted(output.iterdir()):
        if file.name not in listed and file.name.endswith(LOADED):
            raise ValueError(f"{file.name} was not there when the checkpoint was written")
    size = sum(e["bytes"] for e in listed.values())
    how = "as they were written (sha256)" if hashes else "listed with their sha256"
    return f"{len(listed)} files, {size:,} bytes, {how}"


def _read(path: Path) -> dict[str, dict]:
    try:
        raw = json.loads(path.read_text())
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
