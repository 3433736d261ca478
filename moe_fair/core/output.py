"""What a run writes: one run at a time, filled beside its final name, renamed when whole."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import stat
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from moe_fair.core.lock import release, take

INSIDE = "moe_fair"  # what is begun inside an output is called by
WORK = ("partial", "whole", "calibrating", "pruning")  # folders beside or inside
KEPT = WORK[2:]  # of which a run takes up again what a killed one has left
FOUND = "lost+found"  # of an ext4 file system's root
LAST = ("config.json", "pruned.json")  # without which nothing is loaded


@dataclass(frozen=True)
class Place:
    """Where a result shall stand, and where a run works until it is whole.

    Attributes:
        path: the folder, links resolved.
        inside: it is worked inside of: the folder is there and cannot be replaced by another.
    """

    path: Path
    inside: bool = False

    def beside(self, kind: str) -> Path:
        """What a run has beside its output, or inside: `out.partial`, `volume/moe_fair.partial`."""
        if self.inside:
            return self.path / f"{INSIDE}.{kind}"
        return self.path.with_name(f"{self.path.name}.{kind}")

    @property
    def partial(self) -> Path:
        """In which a run makes its result."""
        return self.beside("partial")


def find_place(output: Path) -> Place:
    """The folder that a name stands for, and whether another can be given its name.

    A mount point cannot be replaced, nor can a folder in one that is not writable, nor shall the
    folder in which the command was started.

    Raises:
        ValueError: it is a file, its links lead in a circle, or its name cannot be written to.
    """
    try:
        path = output.resolve()
        circle = path.is_symlink()
    except RuntimeError:  # before Python 3.13
        circle = True
    if circle:
        raise ValueError(f"output {output}: its links lead in a circle; name a directory")
    try:
        str(path).encode()
    except UnicodeEncodeError as e:  # safetensors takes no other
        raise ValueError(f"output {output} is not UTF-8; give another name") from e
    if path.exists() and not path.is_dir():
        raise ValueError(f"output {output} is a file; give a new or empty directory")
    inside = path.is_dir() and (
        _is_mount(path) or path.samefile(os.curdir) or not _is_writable(path.parent)
    )
    return Place(path, inside)


@contextmanager
def claim(output: Path, *, new: bool = True, first: bool = True) -> Iterator[Place]:
    """Inside, an output is this process's: locked, and such that it can be written.

    Args:
        new: it must be a new or an empty directory; otherwise results are added to it.
        first: this process writes; others of the same run are only told where.

    Raises:
        ValueError: another run writes it, it cannot be written, or is not new.
    """
    place = find_place(output)
    if not first:
        yield place
        return
    parent = place.path if place.inside else place.path.parent
    made = _make(parent, output)
    lock = place.beside("lock")
    try:
        _check_kind(lock, stat.S_ISREG)
        take(lock, output)
        try:
            if new:
                for kind in WORK:
                    _check_kind(place.beside(kind), stat.S_ISDIR)
                    if kind in KEPT:
                        _check_links(place.beside(kind))
                check_output(output, place)
            elif place.path.is_dir() and not _is_writable(place.path):
                raise ValueError(f"output directory {output} is not writable; give another")
            yield place
        finally:
            release(lock)
    finally:
        for folder in made:
            with suppress(OSError):  # something has come into it
                folder.rmdir()


def check_output(output: Path, place: Place | None = None) -> None:
    """The directory can be written.

    Raises:
        ValueError: it is a file, or a directory with something in it.
    """
    place = place or find_place(output)
    if place.inside and place.beside("whole").is_dir():
        _move_up(place.beside("whole"), place.path)  # an earlier run was killed at its last step
    own = {place.beside(kind) for kind in (*WORK, "lock")} | {place.path / FOUND}
    if place.path.is_dir() and any(p not in own for p in place.path.iterdir()):
        raise ValueError(
            f"output directory {output} is not empty; give another, or remove it first"
        )


def _make(folder: Path, output: Path) -> list[Path]:
    """Make a folder and those above it; what was made, the deepest first.

    Raises:
        ValueError: there is a file among them, or the nearest that is there is not writable.
    """
    missing = []
    while not folder.exists():
        missing.append(folder)
        folder = folder.parent
    if not folder.is_dir():
        raise ValueError(f"output {output}: {folder} is a file; give a path in a directory")
    if not _is_writable(folder):
        raise ValueError(f"output {output}: {folder} is not writable; write elsewhere")
    for new in reversed(missing):
        new.mkdir(exist_ok=True)
    return missing


def _is_writable(folder: Path) -> bool:
    return os.access(folder, os.W_OK | os.X_OK)


def _is_mount(path: Path) -> bool:
    """A file system, or a part of one (`mount --bind`), is mounted there."""
    if os.path.ismount(path):
        return True
    try:
        mounts = Path("/proc/self/mountinfo").read_bytes().splitlines()
    except OSError:  # not Linux
        return False
    # spaces and the like stand there as \040
    points = (m.split()[4].decode("unicode_escape").encode("latin-1") for m in mounts)
    return os.fsencode(path) in points


def _check_kind(path: Path, right: Any) -> None:
    """What a run is about to use under this name is not there, or of the right kind, and no link.

    Raises:
        ValueError: it is something else.
    """
    try:
        mode = path.lstat().st_mode
    except FileNotFoundError:
        return
    if not right(mode):
        kind = "a link" if stat.S_ISLNK(mode) else "a folder" if stat.S_ISDIR(mode) else "a file"
        raise ValueError(
            f"{path} is {kind} and in the way of what a run keeps there; remove it, or write "
            "elsewhere"
        )


def _check_links(folder: Path) -> None:
    """In what a killed run has left is no link that would be read or written through.

    Raises:
        ValueError: there is one.
    """
    for parent, folders, files in os.walk(folder):
        for name in (*folders, *files):
            path = Path(parent, name)
            if path.is_symlink():
                raise ValueError(f"{path} is a link, which no run leaves there; remove it")


def partial_path(path: Path) -> Path:
    """The sibling in which a run works until it is whole."""
    return path.with_name(path.name + ".partial")


def write_whole(path: Path, text: str) -> None:
    """Write a text file, whole or not at all; its folder is made where there is none."""
    path.parent.mkdir(parents=True, exist_ok=True)
    # of this process: another may write the same file
    partial = partial_path(path.with_name(f"{path.name}.{os.getpid()}"))
    partial.unlink(missing_ok=True)
    try:
        with partial.open("x", encoding="utf-8") as f:  # "x" follows no link
            f.write(text)
        partial.replace(path)
    except BaseException:
        partial.unlink(missing_ok=True)
        raise


def write_named(path: Path, text: str) -> None:
    """Write a text file where a user said: through a link, into a device, never in its place."""
    for stream in (1, 2):  # as /dev/stdout: into it, even where it is a file
        if path.exists() and _is_stream(path, stream):
            with open(stream, "w", encoding="utf-8", closefd=False) as f:
                f.write(text)
            return
    if path.exists() and not path.is_file():
        with path.open("w", encoding="utf-8") as f:
            f.write(text)
    else:
        write_whole(path.resolve() if path.is_symlink() else path, text)


def _is_stream(path: Path, number: int) -> bool:
    try:
        return os.path.samestat(path.stat(), os.fstat(number))
    except OSError:  # closed
        return False


def digest(key: Mapping[str, Any]) -> str:
    """Hex digest of what a stored result depends on, by which a later run knows its own."""
    return hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()


def fresh(folder: Path) -> Path:
    """An empty directory; what an interrupted run left there goes."""
    if folder.is_symlink():
        folder.unlink()
    if folder.exists():
        shutil.rmtree(folder)
    folder.mkdir(parents=True)
    return folder


def settle(folder: Path, output: Path) -> None:
    """Give a whole result its final name.

    Args:
        folder: beside the output, or inside, from where its content moves up.

    Raises:
        OSError: it cannot be; says where the result lies.
    """
    try:
        if folder.parent == output:
            whole = folder.rename(folder.with_suffix(".whole"))
            _move_up(whole, output)
            return
        if output.exists():
            output.rmdir()  # empty: `check_output` saw to it
        folder.rename(output)
    except OSError as e:
        raise OSError(
            f"{output} could not be given its name ({e.strerror}); the result is whole and lies in "
            f"{folder}"
        ) from e


def _move_up(whole: Path, output: Path) -> None:
    """The content of a whole result, into the folder that it lies in; what makes it load, last."""
    for path in sorted(whole.iterdir(), key=lambda p: (p.name in LAST, p.name)):
        path.rename(output / path.name)
    whole.rmdir()


def discard(work: Path) -> None:
    """Forget what an earlier run left."""
    shutil.rmtree(work, ignore_errors=True)
