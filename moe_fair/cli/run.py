"""The command as a program: exit codes, one line for what goes wrong, signals."""

from __future__ import annotations

import logging
import os
import signal
import sys
import traceback

import typer

from moe_fair.cli import terminal
from moe_fair.cli.app import app
from moe_fair.core import interrupts
from moe_fair.core.garbage import end_uncollected
from moe_fair.engines import processes

# what several processes do together; of other commands the first process does all
TOGETHER = (["calibrate"], ["prune"], ["eval"], ["sample"])
# what keeps its work, for the same command to go on with
GOING_ON = (["calibrate"], ["prune"], ["oracle"], ["push"], ["sample"], ["vision", "prune"])


def main(arguments: list[str] | None = None) -> None:
    """Run the command line: exit code 2 and one line for bad input, a traceback with --debug."""
    if arguments is None:
        arguments = sys.argv[1:]
        end_uncollected()
    if arguments[:1] not in TOGETHER:
        if not processes.is_first():
            sys.exit(0)
        processes.stay_alone()
    with terminal.streams(), interrupts.handled(alone=processes.processes() == 1):
        _quieten()
        code = _run(arguments)
    # out here, where nothing holds the frames of what failed: after a lack of memory, what torch
    # does when Python ends needs some
    sys.exit(code)


def _run(arguments: list[str]) -> int:
    """Run a command; returns the exit code."""
    try:
        processes.current_team()
        command = typer.main.get_command(app)
        code = command.main(arguments, prog_name="moe-fair", standalone_mode=False)
        processes.finish()
        sys.stdout.flush()  # a disk that is full says so here
        return code if isinstance(code, int) else 0
    except interrupts.Interrupted as e:
        return _interrupted(e.number, arguments)
    except Exception as e:
        # what was being imported, or other people's code, may have made an error of it
        if (number := interrupts.caught()) is not None:
            return _interrupted(number, arguments)
        if "--debug" in arguments:
            for line in traceback.format_exc().splitlines():
                terminal.say(line)
        return _fail(e, arguments)


def _interrupted(number: int, arguments: list[str]) -> int:
    """Print one line for a signal and return the exit code that shells give it."""
    text = "interrupted" if number == signal.SIGINT else f"ended by {signal.Signals(number).name}"
    if (output := interrupts.whole()) is not None:
        text += f"; the result in {output} is whole"
    elif any(arguments[: len(words)] == words for words in GOING_ON):
        text += "; the same command goes on where it stopped"
    if processes.is_first():
        terminal.say(f"moe-fair: {text}")
    return 128 + number


def _fail(e: Exception, arguments: list[str]) -> int:
    """Print one line for an exception and return the exit code: 2 where the user can mend it."""
    format_message = getattr(e, "format_message", None)  # what the option parser raises
    if format_message is not None:
        text = format_message()
        if not text:  # no arguments at all: the help was printed
            return getattr(e, "exit_code", 2)
        option = next((a for a in arguments[:-1] if f"'{a}'" in text), None)
        given = f"{option} {arguments[arguments.index(option) + 1]!r}: " if option else ""
        text = f"moe-fair: error: {given}{' '.join(text.split())} (--help lists the options)"
        return processes.fail(text, terminal.say, 2)
    text = " ".join(str(e).split()) or type(e).__name__
    if (lack := _lack(e, text)) is not None:
        return processes.fail(f"moe-fair: error: {lack}", terminal.say, 2)
    if isinstance(e, (ValueError, OSError)):
        return processes.fail(f"moe-fair: error: {text}", terminal.say, 2)
    text = f"moe-fair: internal error: {type(e).__name__}: {text} (--debug shows where)"
    return processes.fail(text, terminal.say, 1)


def _lack(e: Exception, text: str) -> str | None:
    """What the machine ran out of, in words; the libraries below have many kinds of exception."""
    from moe_fair.engines.oom import lacking, out_of_memory

    if out_of_memory(e):
        return (
            f"out of memory: {lacking(e)}; use a smaller --batch-size, --engine streaming, or "
            "--checkpointing; the same command goes on where it stopped"
        )
    if type(e).__name__ == "SafetensorError":
        return f"a safetensors file could not be read or written: {text}"
    return None


def _quieten() -> None:
    """Leave the screen to our own progress: no bars or advice of the libraries below."""
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "0" if sys.stderr.isatty() else "1")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    os.environ.setdefault("TQDM_LEAVE", "")  # a bar that is done goes
    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    logging.captureWarnings(True)
