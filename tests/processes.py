"""Python processes of their own that need not import torch again: forked from one that has.

Starting Python, torch and what torch brings along takes longer than most commands that are tested.
A process made here is real in every other way: its own pid to kill, environment, working folder,
files for what it prints. Nothing that reads the environment when it is imported is there before.
"""

from __future__ import annotations

import atexit
import multiprocessing
import os
import re
import runpy
import signal
import socket
import subprocess
import sys
import traceback
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from multiprocessing import forkserver
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

_context = multiprocessing.get_context("forkserver")
# none of them reads a variable of ours, of huggingface_hub or of transformers
ALWAYS = ["torch", "torch.distributed.tensor", "torch._dynamo", "scipy.stats", "matplotlib.pyplot"]
_context.set_forkserver_preload(ALWAYS)
# these do, as they are imported: for processes whose variables of theirs are those of the tests
THEIRS = re.compile(r"HF_|HUGGING|TRANSFORMERS_|DATASETS_|USE_|ACCELERATE_|XDG_|HOME$")
_alike: dict[tuple[tuple[str, str], ...], forkserver.ForkServer] = {}
LIKE_THE_TESTS = [
    *ALWAYS, "transformers.generation.utils", "transformers.models.auto.tokenization_auto",
    "transformers.models.qwen2_moe.modeling_qwen2_moe", "accelerate", "datasets", "pydantic",
]  # fmt: skip


def _theirs(env: Mapping[str, str]) -> tuple[tuple[str, str], ...]:
    return tuple(sorted((k, v) for k, v in env.items() if THEIRS.match(k)))


@contextmanager
def _server_for(env: Mapping[str, str]) -> Iterator[None]:
    """Processes started inside come from the server that has imported most of what they need."""
    theirs = _theirs(env)
    if theirs != _theirs(os.environ):
        yield
        return
    if theirs not in _alike:
        _alike[theirs] = forkserver.ForkServer()
        _alike[theirs].set_forkserver_preload(LIKE_THE_TESTS)
    usual = forkserver.connect_to_new_process
    forkserver.connect_to_new_process = _alike[theirs].connect_to_new_process
    try:
        yield
    finally:
        forkserver.connect_to_new_process = usual


class Python:
    """`python COMMAND`, running: `-m module ...`, `-c code ...` or `script ...`."""

    def __init__(
        self,
        command: Sequence[object],
        stdout: Path,
        stderr: Path | None = None,
        env: Mapping[str, str] | None = None,
        cwd: Path | None = None,
    ) -> None:
        """Start it; standard error goes where standard output goes unless it has a file."""
        given = [str(c) for c in command]
        for file in {stdout, stderr or stdout}:
            file.write_bytes(b"")
        environment = dict(os.environ if env is None else env)
        arguments = (given, stdout, stderr or stdout, environment, cwd or Path.cwd())
        self._process = _context.Process(target=_child, args=arguments)
        with _server_for(environment):
            self._process.start()

    def poll(self) -> int | None:
        """The exit code, -9 for one killed by that signal; None while it runs."""
        return self._process.exitcode

    def wait(self, timeout: float | None = None) -> int:
        """The exit code.

        Raises:
            subprocess.TimeoutExpired: it still runs.
        """
        self._process.join(timeout)
        code = self._process.exitcode
        if code is None:
            raise subprocess.TimeoutExpired(self._process.name, timeout or 0)
        return code

    def kill(self, number: int = signal.SIGKILL) -> None:
        """SIGKILL, or another signal; nothing where it has ended."""
        if self._process.exitcode is None and self._process.pid is not None:
            os.kill(self._process.pid, number)


def python(
    *command: object,
    env: Mapping[str, str] | None = None,
    cwd: Path | None = None,
    timeout: float | None = None,
) -> subprocess.CompletedProcess[str]:
    """`python COMMAND` to its end, with what it printed."""
    with TemporaryDirectory() as folder:
        out, err = Path(folder) / "out", Path(folder) / "err"
        running = Python(command, out, err, env, cwd)
        try:
            code = running.wait(timeout)
        finally:
            running.kill()
        return subprocess.CompletedProcess(command, code, out.read_text(), err.read_text())


LIMITED = """
import resource, sys
# what is imported counts, too
import moe_fair.pipelines.moe, moe_fair.cli.tables, moe_fair.report.write
import moe_fair.pipelines.repair, moe_fair.report.moe, moe_fair.moe.checkpoint_writer
import pydantic, transformers.generation.utils, transformers.models.qwen2_moe.modeling_qwen2_moe
from moe_fair.cli import main
pages = int(open("/proc/self/statm").read().split()[0])
most = pages * resource.getpagesize() + int(sys.argv[1]) * 2**20
resource.setrlimit(resource.RLIMIT_AS, (most, most))
main(sys.argv[2:])
"""


def limited(
    megabytes: int, *command: object, env: Mapping[str, str]
) -> subprocess.CompletedProcess[str]:
    """`moe-fair COMMAND` with so much more memory than the imports take, as by `ulimit -v`.

    Not forked: how memory is allocated is decided when a process starts.
    """
    return subprocess.run(
        [sys.executable, "-c", LIMITED, str(megabytes), *map(str, command)],
        capture_output=True, text=True, check=False, env={**env, "OMP_NUM_THREADS": "1"},
    )  # fmt: skip


def port() -> str:
    """A free one on this machine."""
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return str(s.getsockname()[1])


def _child(command: list[str], stdout: Path, stderr: Path, env: dict[str, str], cwd: Path) -> None:
    for descriptor, file in ((1, stdout), (2, stderr)):
        opened = os.open(file, os.O_WRONLY | os.O_APPEND)
        os.dup2(opened, descriptor)
        os.close(opened)
    os.chdir(cwd)
    os.environ.clear()
    os.environ.update(env)
    if "OMP_NUM_THREADS" in env:  # torch read another one
        import torch

        torch.set_num_threads(int(env["OMP_NUM_THREADS"]))
    sys.path[:0] = ["", *filter(None, env.get("PYTHONPATH", "").split(os.pathsep))]
    code: Any = 1
    try:
        _run(command)
        code = 0
    except SystemExit as e:
        code = e.code
        if isinstance(code, str):
            print(code, file=sys.stderr)
            code = 1
    except BaseException:
        traceback.print_exc()
    atexit._run_exitfuncs()  # multiprocessing leaves them out
    for stream in (sys.stdout, sys.stderr):
        stream.flush()
    os._exit(code or 0)


def _run(command: list[str]) -> None:
    first, *rest = command
    if first == "-m":
        sys.argv = rest
        runpy.run_module(rest[0], run_name="__main__", alter_sys=True)
    elif first == "-c":
        sys.argv = ["-c", *rest[1:]]
        exec(compile(rest[0], "<string>", "exec"), {"__name__": "__main__"})
    else:
        sys.argv = command
        sys.path.insert(0, str(Path(first).parent))
        runpy.run_path(first, run_name="__main__")
