"""The first signal ends a run in order, a second at once."""

from __future__ import annotations

import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from moe_fair.core import interrupts
from moe_fair.core.interrupts import Interrupted, closing, handled

# the main thread is in C code, which never ends
BUSY = """
import sqlite3, sys
from pathlib import Path
from moe_fair.core.interrupts import handled
from moe_fair.core.lock import take
take(Path(sys.argv[1]), Path("out"))
with handled():
    print("busy", flush=True)
    counting = "WITH RECURSIVE c(x) AS (SELECT 1 UNION ALL SELECT x + 1 FROM c)"
    sqlite3.connect(":memory:").execute(f"{counting} SELECT count(*) FROM c").fetchall()
"""


@pytest.mark.slow
@pytest.mark.parametrize("sent", [[signal.SIGINT, signal.SIGINT], [signal.SIGTERM]])
def test_a_process_that_computes_in_c_code(tmp_path: Path, sent: list[signal.Signals]) -> None:
    command = [sys.executable, "-c", BUSY, str(tmp_path / "out.lock")]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as busy:
        assert busy.stdout is not None
        assert busy.stderr is not None
        assert busy.stdout.readline() == b"busy\n"
        for number in sent:
            time.sleep(0.5)  # it is there by now
            assert busy.poll() is None
            busy.send_signal(number)
        started = time.monotonic()
        try:
            code = busy.wait(timeout=30)
        finally:
            busy.kill()  # else leaving waits for it for ever
        assert code == 128 + sent[-1]
        assert time.monotonic() - started < (1 if len(sent) > 1 else interrupts.PATIENCE + 2)
        assert busy.stderr.read() == b""
    assert list(tmp_path.iterdir()) == []


def test_a_result_gets_its_name_whole() -> None:
    steps = []
    before = signal.getsignal(signal.SIGINT)

    def run() -> None:
        with closing(Path("out")):
            signal.raise_signal(signal.SIGINT)
            steps.append("renamed")
        steps.append("summary")

    with pytest.raises(Interrupted) as found, handled():
        run()
    assert steps == ["renamed"]
    assert found.value.number == signal.SIGINT
    assert interrupts.whole() == Path("out")
    signal.signal(signal.SIGINT, before)


def test_signals_that_are_ignored_stay_so() -> None:
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    with handled():
        signal.raise_signal(signal.SIGINT)
    assert signal.getsignal(signal.SIGINT) is signal.SIG_IGN
    signal.signal(signal.SIGINT, before)
    assert interrupts.caught() is None
    assert interrupts.whole() is None
