"""A checkpoint as GGUF, by llama.cpp's own converter."""

from __future__ import annotations

import os
import shlex
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from moe_fair.core.engine_facts import NO, verdict
from moe_fair.core.layout import read_layout
from moe_fair.core.output import fresh, partial_path
from moe_fair.moe.padding import Padding, plan_padding, write_padded
from moe_fair.pipelines.checks import check_disk
from moe_fair.publish.made_file import check_file
from moe_fair.report.numbers import amount

ENGINE = "llama.cpp"
SCRIPT = "convert_hf_to_gguf.py"
SOURCE = "LLAMA_CPP"  # variable that names a copy of llama.cpp


@dataclass(frozen=True)
class Exported:
    """What was written.

    Attributes:
        file: the GGUF.
        bytes: of it.
        command: that made it.
        padded: of the checkpoint's weights, before and padded; None where nothing was.
    """

    file: Path
    bytes: int
    command: str
    padded: tuple[int, int] | None


def export_gguf(
    out: Path,
    *,
    file: Path | None = None,
    converter: Path | None = None,
    outtype: str = "auto",
    pad: bool = False,
    say: Callable[[str], None] = lambda _: None,
) -> Exported:
    """Convert a checkpoint whose layers keep equal numbers of experts, or one padded to them.

    Args:
        out: the checkpoint, pruned or not.
        file: to write; OUT.gguf beside it.
        converter: llama.cpp's `convert_hf_to_gguf.py`; looked for where None.
        outtype: data type, as the converter takes it.
        pad: an unequal result with every layer at the largest number.

    Raises:
        ValueError: layers differ and are not padded, no converter, no room, a file that cannot be
            written, or the converter fails; says why.
    """
    layout = read_layout(out)
    padding = None
    if layout.equal and pad:
        raise ValueError(f"--pad: all layers of {out} have {layout.counts[0]} experts already")
    if layout.equal:
        found = verdict(ENGINE, layout, str(out))
        if found.serves == NO:
            raise ValueError(f"{out}: {found.why}")
    else:
        padding = _padding(out, pad)
    script = find_converter(converter)
    file = file or out.absolute().with_name(f"{out.absolute().name}.gguf")
    check_file(file)
    size = padding.bytes[1] if padding else _weights(out)
    check_disk(size * (2 if padding else 1), file, file.parent)
    work = partial_path(file.with_name(f"{file.name}.{os.getpid()}"))
    folder = work.with_name(f"{work.name}.padded")
    try:
        if padding:
            before, after = padding.bytes
            say(
                f"padded to {padding.experts} experts in every layer: {amount(before)}B become "
                f"{amount(after)}B"
            )
            write_padded(padding, fresh(folder))
        command = [*script, str(folder if padding else out), "--outfile", str(work)]
        command += ["--outtype", outtype]
        say(f"converting with {shlex.join(script)}")
        _convert(command, work)
        work.replace(file)
    finally:
        work.unlink(missing_ok=True)
        shutil.rmtree(folder, ignore_errors=True)
    return Exported(
        file, file.stat().st_size, shlex.join(command), padding.bytes if padding else None
    )


def find_converter(given: Path | None) -> list[str]:
    """How llama.cpp's converter is called: as given, in the folder of LLAMA_CPP, or on the PATH.

    Raises:
        ValueError: there is none; says where it comes from.
    """
    if given is not None and not given.is_file():
        raise ValueError(f"--converter {given}: no such file; give llama.cpp's {SCRIPT}")
    path = given
    if path is None and (source := os.environ.get(SOURCE)):
        path = Path(source) / SCRIPT
        if not path.is_file():
            raise ValueError(f"{SOURCE}={source}: no {SCRIPT} in it")
    if path is None and (on_path := shutil.which(SCRIPT)):
        path = Path(on_path)
    if path is None:
        raise ValueError(
            f"no {SCRIPT} on the PATH: get llama.cpp's source (github.com/ggml-org/llama.cpp) and "
            f"give --converter FILE, or {SOURCE}=FOLDER"
        )
    return [sys.executable, str(path)] if path.suffix == ".py" else [str(path)]


def _padding(out: Path, pad: bool) -> Padding:
    """How an unequal result is padded.

    Raises:
        ValueError: it cannot be, or was not asked for; says what works instead.
    """
    why = verdict(ENGINE, read_layout(out), str(out)).why
    other = (
        "prune it with --for llama.cpp (equal counts), or serve it with what `moe-fair check` lists"
    )
    try:
        found = plan_padding(out)
    except (ValueError, KeyError) as e:
        more = f"; --pad cannot help: {e}" if pad else ""
        raise ValueError(f"{out} is not for {ENGINE}: {why}{more}; {other}") from e
    if not pad:
        before, after = found.bytes
        raise ValueError(
            f"{out} is not for {ENGINE}: {why}; give --pad ({found.experts} experts in every "
            f"layer, {amount(after)}B in place of {amount(before)}B, exact), or {other}"
        )
    return found


def _weights(out: Path) -> int:
    return sum(f.stat().st_size for f in out.glob("*.safetensors"))


def _convert(command: list[str], made: Path) -> None:
    """Run the converter.

    Raises:
        ValueError: it fails, with its last line.
    """
    ended = subprocess.run(
        command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
        text=True, errors="replace", check=False,
    )  # fmt: skip
    if ended.returncode or not made.is_file():
        lines = [x.strip() for x in ended.stdout.splitlines() if x.strip()]
        last = lines[-1] if lines else f"exit code {ended.returncode}"
        raise ValueError(f"llama.cpp's converter failed: {last}; to see all: {shlex.join(command)}")
