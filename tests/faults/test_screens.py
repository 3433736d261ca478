"""What reaches the screen when a run is stopped, nobody reads it, or names are hostile."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from places import CALIBRATION, MODEL
from processes import python

from moe_fair.cli import main, tables
from moe_fair.cli.render import render
from moe_fair.core import interrupts
from moe_fair.engines import shard_writer
from moe_fair.moe.checkpoint_source import Checkpoint
from moe_fair.report.document import Table, screen
from moe_fair.report.sparse import summary

TEXT = ["-c", str(CALIBRATION), "--samples", "4", "--length", "32"]
GOES_ON = "; the same command goes on where it stopped"


@pytest.fixture
def cut(statistics_folder: Path) -> list[str]:
    """A `prune` of a second."""
    return [
        "prune", str(MODEL), "--stats", str(statistics_folder), "--experts", "40",
        "--repair", "none", "--rivals", "none", "-o",
    ]  # fmt: skip


@pytest.fixture
def handlers() -> Iterator[None]:
    """The signals' own afterwards."""
    before = {n: signal.getsignal(n) for n in interrupts.HANDLED}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


def ended(capsys: pytest.CaptureFixture[str], *arguments: object) -> tuple[int, str]:
    """The command's exit code, and the lines of its own about how it ended."""
    with pytest.raises(SystemExit) as stop:
        main([str(a) for a in arguments])
    lines = [x for x in capsys.readouterr().err.splitlines() if x.startswith("moe-fair")]
    assert isinstance(stop.value.code, int)
    return stop.value.code, "\n".join(lines)


@pytest.mark.slow
@pytest.mark.usefixtures("handlers")
@pytest.mark.parametrize(
    ("number", "said"), [(signal.SIGINT, "interrupted"), (signal.SIGTERM, "ended by SIGTERM")]
)
def test_a_signal_says_that_the_run_goes_on(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path,
    cut: list[str], number: signal.Signals, said: str,
) -> None:  # fmt: skip
    copy, calls = shard_writer._copy_some, []

    def stopped(*arguments: int) -> int:
        calls.append(arguments)
        if len(calls) == 20:
            signal.raise_signal(number)
        return copy(*arguments)

    monkeypatch.setattr(shard_writer, "_copy_some", stopped)
    code, line = ended(capsys, *cut, tmp_path / "out")
    assert (code, line) == (128 + number, f"moe-fair: {said}{GOES_ON}")
    assert [p.name for p in tmp_path.iterdir()] == ["out.partial"]  # the lock is gone
    assert ended(capsys, *cut, tmp_path / "out") == (0, "")
    assert [p.name for p in tmp_path.iterdir()] == ["out"]


@pytest.mark.usefixtures("handlers")
def test_an_interrupt_of_which_others_made_an_error(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def load(*_: object, **__: object) -> None:
        try:
            signal.raise_signal(signal.SIGINT)
        except BaseException as e:
            raise ImportError("while C code was being imported") from e

    monkeypatch.setattr(Checkpoint, "load", load)
    code, line = ended(capsys, "calibrate", MODEL, *TEXT, "-o", tmp_path / "out")
    assert (code, line) == (130, f"moe-fair: interrupted{GOES_ON}")


@pytest.mark.slow
@pytest.mark.usefixtures("handlers")
def test_a_signal_when_the_result_is_there(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path,
    cut: list[str],
) -> None:  # fmt: skip
    monkeypatch.setattr(tables, "plan_table", lambda _: signal.raise_signal(signal.SIGINT))
    code, line = ended(capsys, *cut, tmp_path / "out")
    assert (code, line) == (
        130,
        f"moe-fair: interrupted; the result in {tmp_path / 'out'} is whole",
    )
    assert (tmp_path / "out" / "config.json").is_file()


@pytest.mark.usefixtures("handlers")
def test_a_command_that_keeps_nothing_does_not_say_so(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, statistics_folder: Path
) -> None:
    monkeypatch.setattr(tables, "plan_table", lambda _: signal.raise_signal(signal.SIGINT))
    found = ended(capsys, "plan", statistics_folder, "--experts", 40)
    assert found == (130, "moe-fair: interrupted")


SHELL = f'run() {{ "{sys.executable}" -m moe_fair "$@"; }}; '


def shell(line: str) -> subprocess.CompletedProcess[str]:
    """By a shell, with the streams as users have them."""
    return subprocess.run(["bash", "-c", SHELL + line], capture_output=True, text=True)


@pytest.mark.parametrize(
    "line", ["run --version >&-", "run -h | true; exit ${PIPESTATUS[0]}", "run -h 2>&- >/dev/null"]
)
def test_nobody_reads_the_screen(line: str) -> None:
    done = shell(line)
    assert (done.returncode, done.stderr) == (0, "")


@pytest.mark.slow
@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no /dev/full on this system")
def test_a_screen_that_is_a_full_disk() -> None:
    done = shell("run --version >/dev/full")
    assert done.returncode == 2
    assert done.stderr == ("moe-fair: error: [Errno 28] standard output: No space left on device\n")
    assert shell("run --version 2>/dev/full").returncode == 0


@pytest.mark.slow
@pytest.mark.parametrize(
    "end",
    [
        "| head -1; exit ${PIPESTATUS[0]}",
        pytest.param(">&-", marks=pytest.mark.nightly),
        pytest.param("2>&1 >&- | true", marks=pytest.mark.nightly),
    ],
)
def test_nobody_reads_a_plan(statistics_folder: Path, end: str) -> None:
    done = shell(f'run plan "{statistics_folder}" --experts 40 {end}')
    assert done.returncode == 0
    assert done.stderr in ("", "note: not tried against other plans, which takes the model: prune "
                           "--stats does\n")  # fmt: skip


GONE = """
import os, sys
reader, writer = os.pipe()
os.close(reader)
for number in (1, 2):
    os.dup2(writer, number)
from moe_fair.cli import main
main(sys.argv[1:])
"""


@pytest.mark.slow
def test_nobody_reads_what_a_run_says(cut: list[str], tmp_path: Path) -> None:
    """Neither stream: the run goes on to its end."""
    assert python("-c", GONE, *cut, tmp_path / "out").returncode == 0
    assert [p.name for p in tmp_path.iterdir()] == ["out"]


NAMES = ["run[v2]", "[/bold]x", ":smile:", "a\x1b[31mb", "a\nmoe-fair: error: b"]
SHOWN = ["run[v2]", "[/bold]x", ":smile:", r"a\x1b[31mb", r"a\nmoe-fair: error: b"]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "shown"),
    [
        pytest.param(*both, id=str(i), marks=pytest.mark.nightly if i in (1, 2) else ())
        for i, both in enumerate(zip(NAMES, SHOWN, strict=True))
    ],
)
def test_outputs_with_hostile_names(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path,
    cut: list[str], name: str, shown: str,
) -> None:  # fmt: skip
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit, match="0"):
        main([*cut, name])
    said = capsys.readouterr()
    assert f'from_pretrained("{shown}", trust_remote_code=True)' in said.out
    assert f"report: {shown}/moe_fair/report.html\n" in said.out
    assert "\x1b" not in said.out + said.err
    assert Path(name, "config.json").is_file()


def test_errors_that_quote_names(fails: Callable[..., str], tmp_path: Path) -> None:
    said = fails("prune", "no\x1b[2Jmodel\x9b", "--experts", 40, "-o", tmp_path / "out")
    assert r"no\x1b[2Jmodel\x9b" in said
    assert "\x1b" not in said
    name = os.fsdecode(b"\xff")  # which safetensors cannot write
    assert r"\udcff is not UTF-8" in fails("prune", MODEL, "--experts", 40, "-o", tmp_path / name)
    assert list(tmp_path.iterdir()) == []
    assert r"'a\x07'" in fails("prune", MODEL, "--experts", "a\x07", "-o", tmp_path / "out")


@pytest.mark.slow
def test_calibration_that_tells_of_names(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    text = Path(shutil.copytree(CALIBRATION, tmp_path / "text"))
    next(text.glob("python*")).rename(text / "py[bold]\x1b[31m\n.txt")
    with pytest.raises(SystemExit, match="0"):
        main([
            "calibrate", str(MODEL), "-c", str(text), "--samples", "4", "--length", "32",
            "-o", str(tmp_path / "stats\x07"),
        ])  # fmt: skip
    said = capsys.readouterr()
    assert r"py[bold]\x1b[31m\n" in said.err
    assert f"moe-fair plan {tmp_path}/stats\\x07 --experts N" in said.out
    assert not {"\x1b", "\x07"} & set(said.out + said.err)


def test_tables_with_hostile_names(capsys: pytest.CaptureFixture[str]) -> None:
    rows = ((r"[red]x[/red]", "1"), ("a\x1b[31m", "2"), ("b\nc", "3"), ("[/oops]:smile:", "4"))
    render(screen([Table(("task", "items"), rows)]))
    said = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in said[1:]] == [
        "[red]x[/red]", r"a\x1b[31m", r"b\nc", "[/oops]:smile:",
    ]  # fmt: skip


def test_layers_with_hostile_names(capsys: pytest.CaptureFixture[str]) -> None:
    layer: dict[str, Any] = {
        "weights": 4, "kept": 2, "sparsity": 0.5, "shift": "nowhere", "name": "[/x]\x1b[2Jlayer",
    }  # fmt: skip
    result = {
        "settings": {"allocate": "lamp", "repair": "none"}, "layers": [layer],
        "top1": {"dense": 1.0, "pruned": 0.5, "final": 0.5},
        "sparsity": {"zeros": 2, "weights": 4, "parameters": 5},
        "left_dense": {"head[/b]\x1b": "why\nnot"},
    }  # fmt: skip
    render(summary(result, Path("[/bold]out\x07")))
    said = capsys.readouterr().out
    assert said.count(r"[/x]\x1b[2Jlayer") == 2
    assert r"left dense: head[/b]\x1b, why\nnot" in said
    assert r'load_pruned("[/bold]out\x07")' in said
    assert not {"\x1b", "\x07"} & set(said)
