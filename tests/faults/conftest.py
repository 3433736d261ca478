"""Shared by the tests of faults: a command that must fail in one line."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from moe_fair.cli import main


@pytest.fixture
def fails(capsys: pytest.CaptureFixture[str]) -> Callable[..., str]:
    """Run the command; assert exit code 2 and one line; return that line."""

    def run(*arguments: object) -> str:
        with pytest.raises(SystemExit) as stop:
            main([str(a) for a in arguments])
        lines = capsys.readouterr().err.strip().splitlines()
        assert stop.value.code == 2, lines
        assert lines[-1].startswith("moe-fair: error: "), lines
        assert not any("Traceback" in x for x in lines)
        return lines[-1]

    return run
