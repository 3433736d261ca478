"""Out of memory: smaller batches, then one layer at a time, and the same statistics."""

from __future__ import annotations

import errno
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from places import CALIBRATION, HELDOUT, MODEL, ROOT
from test_several_processes import start, torchrun

from moe_fair import pipeline
from moe_fair.cli import main
from moe_fair.core.units import Statistics
from moe_fair.engines.batch import Batch
from moe_fair.engines.lack import out_of_memory
from moe_fair.moe import collect as collecting
from moe_fair.moe.load import Checkpoint
from moe_fair.recipe import Recipe

# 8 sequences of each of two domains, in one batch each
SETTINGS: dict[str, Any] = {
    "model": str(MODEL), "calibration": tuple(str(CALIBRATION / f"{n}.jsonl") for n in
    ("python", "rust-docs")), "samples": 16, "length": 12, "dtype": "float32",
    "counterfactual": False,
}  # fmt: skip
Fails = Callable[..., str]


@pytest.fixture(scope="module")
def undisturbed() -> Statistics:
    found = pipeline.calibrate(Recipe(**SETTINGS))
    assert found is not None
    return found


def few(limit: int, error: Callable[[], Exception], resident: bool | None = None) -> Any:
    """An experts' forward that has memory for so many sequences at a time.

    Args:
        resident: lacks memory where the model is whole in memory alone; None: everywhere.
    """
    stock = collecting._Tap.forward

    def forward(self: Any, hidden: torch.Tensor, *rest: torch.Tensor) -> torch.Tensor:
        whole = not any(p.is_meta for p in self.collector.blocks[0].experts.parameters())
        whole = whole and not any(p.is_meta for p in self.collector.blocks[-1].experts.parameters())
        here = resident is None or resident == whole
        if here and len(self.collector.batch.mask) > limit and self is self.collector._taps[3]:
            raise error()
        return stock(self, hidden, *rest)

    return forward


def cuda() -> Exception:
    return torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 MiB.")


def cpu() -> Exception:
    return RuntimeError(
        "[enforce fail at alloc_cpu.cpp:124] err == 0. DefaultCPUAllocator: can't allocate memory: "
        "you tried to allocate 4096 bytes. Error code 12 (Cannot allocate memory)"
    )


def close(a: Statistics, b: Statistics, limit: float) -> None:
    """All sums, rows and counts to this share of the largest of their kind and group."""
    assert a.groups == b.groups
    assert a.fingerprint == b.fingerprint
    for name in ("sequence_ids", "sequence_domains", "tokens", "sequences"):
        assert torch.equal(getattr(a, name), getattr(b, name))
    for g in a.groups:
        assert torch.equal(a.sums[g.name]["tokens"], b.sums[g.name]["tokens"])
        pairs = [(v, b.sums[g.name][k], k) for k, v in a.sums[g.name].items()]
        for x, y, kind in [*pairs, (a.rows[g.name], b.rows[g.name], "rows")]:
            assert (x - y).abs().max() <= limit * x.abs().max(), (g.name, kind)


def same(a: Statistics, b: Statistics) -> bool:
    kinds = all(torch.equal(v, b.sums[g][k]) for g, sums in a.sums.items() for k, v in sums.items())
    return kinds and all(torch.equal(v, b.rows[g]) for g, v in a.rows.items())


# a matrix product of other height rounds otherwise, in float32 as in its 24 bits
FLOAT32 = 2e-5


@pytest.mark.parametrize(("limit", "error"), [(5, cpu), (5, MemoryError), (1, cuda)])
def test_smaller_batches(
    monkeypatch: pytest.MonkeyPatch, undisturbed: Statistics, limit: int,
    error: Callable[[], Exception],
) -> None:  # fmt: skip
    monkeypatch.setattr(collecting._Tap, "forward", few(limit, error))
    said: list[str] = []
    found = pipeline.calibrate(Recipe(**SETTINGS), say=said.append)
    assert found is not None
    lines = [x for x in said if "out of memory" in x]
    halves = {5: [(4, 8)], 1: [(4, 8), (2, 4), (1, 2)]}[limit]
    assert len(lines) == len(halves)
    for line, (new, old) in zip(lines, halves, strict=True):
        assert f"again with {new} sequences at a time instead of {old}" in line
        assert "\n" not in line
    close(undisturbed, found, FLOAT32)
    fair = Recipe(experts=40, method="fair")
    plans = [pipeline.plan(s, fair).kept for s in (undisturbed, found)]
    assert plans[0] == plans[1]


@contextmanager
def exact() -> Iterator[None]:
    """Models in float64, by transformers' own loop over experts: what rounding hides is seen."""
    load = Checkpoint.load

    def double(self: Checkpoint, *arguments: Any, **keywords: Any) -> Any:
        model = load(self, *arguments, **keywords).double()
        model.set_experts_implementation("eager")
        return model

    Checkpoint.load = double  # type: ignore[method-assign]
    yield
    Checkpoint.load = load  # type: ignore[method-assign]


@pytest.mark.parametrize("limit", [4, 1])
def test_in_float64_nothing_but_the_last_digits_differ(
    monkeypatch: pytest.MonkeyPatch, limit: int
) -> None:
    with exact():
        whole = pipeline.calibrate(Recipe(**SETTINGS))
        monkeypatch.setattr(collecting._Tap, "forward", few(limit, cuda))
        parts = pipeline.calibrate(Recipe(**SETTINGS))
    assert whole is not None
    assert parts is not None
    close(whole, parts, 1e-12)


@pytest.mark.parametrize("when", ["running", "loading"])
def test_one_layer_at_a_time_gives_the_same_bits(
    monkeypatch: pytest.MonkeyPatch, undisturbed: Statistics, when: str
) -> None:
    if when == "running":
        monkeypatch.setattr(collecting._Tap, "forward", few(0, cuda, resident=True))
    else:
        monkeypatch.setattr(Checkpoint, "load", lambda *_: (_ for _ in ()).throw(cuda()))
    said: list[str] = []
    found = pipeline.calibrate(Recipe(**SETTINGS), say=said.append)
    assert found is not None
    lines = [x for x in said if "out of memory" in x]
    assert len(lines) == (4 if when == "running" else 1)
    assert "again with the streaming engine, one layer at a time" in lines[-1]
    assert same(found, undisturbed)


def test_streaming_in_smaller_batches(
    monkeypatch: pytest.MonkeyPatch, undisturbed: Statistics
) -> None:
    monkeypatch.setattr(collecting._Tap, "forward", few(2, cuda))
    said: list[str] = []
    found = pipeline.calibrate(Recipe(**SETTINGS, engine="streaming"), say=said.append)
    assert found is not None
    assert sum("out of memory" in x for x in said) == 2
    close(undisturbed, found, FLOAT32)


def test_nothing_smaller_to_try(
    monkeypatch: pytest.MonkeyPatch, fails: Fails, tmp_path: Path
) -> None:
    monkeypatch.setattr(collecting._Tap, "forward", few(0, cuda))
    run = ["calibrate", MODEL, "-c", CALIBRATION, "--samples", 4, "--length", 16, "-o"]
    said = fails(*run, tmp_path / "stats")
    assert "nothing smaller to try than one sequence of 16 tokens with the streaming engine" in said
    assert "give a smaller --length" in said
    assert not (tmp_path / "stats").exists()


def test_other_errors_are_not_taken_for_it(
    monkeypatch: pytest.MonkeyPatch, undisturbed: Statistics
) -> None:
    def wrong() -> Exception:
        return RuntimeError("mat1 and mat2 shapes cannot be multiplied")

    monkeypatch.setattr(collecting._Tap, "forward", few(0, wrong))
    with pytest.raises(RuntimeError, match="mat1 and mat2"):
        pipeline.calibrate(Recipe(**SETTINGS))
    assert out_of_memory(OSError(errno.ENOMEM, os.strerror(errno.ENOMEM)))
    assert not out_of_memory(OSError(errno.EIO, os.strerror(errno.EIO)))
    assert not out_of_memory(ValueError("out of memory"))


def test_held_out_losses_too(
    monkeypatch: pytest.MonkeyPatch, statistics_folder: Path, tmp_path: Path
) -> None:
    """Logits of more than two windows do not fit."""
    from moe_fair.engines import resident
    from moe_fair.pipeline import heldout_set, measure

    recipe = Recipe(model=str(MODEL), heldout=(str(HELDOUT),), heldout_samples=6, length=24)
    source = Checkpoint(str(MODEL))
    text = heldout_set(recipe, source)
    assert text is not None
    whole = measure(recipe, source, text, "whole")
    stock = resident.ResidentEngine._logits

    def logits(self: Any, batch: Batch) -> torch.Tensor:
        if len(batch.mask) > 2:
            raise cuda()
        return stock(self, batch)

    monkeypatch.setattr(resident.ResidentEngine, "_logits", logits)
    parts = measure(recipe, source, text, "parts")
    assert parts.tokens == whole.tokens
    assert parts.mean == pytest.approx(whole.mean, rel=1e-6)


def test_a_killed_run_goes_on_and_other_batch_sizes_do_not_mix(
    monkeypatch: pytest.MonkeyPatch, undisturbed: Statistics, tmp_path: Path
) -> None:
    """Chunks made with less memory belong to the batch size that was asked for, and no other."""
    recipe = Recipe(**SETTINGS, save_every=1)
    with monkeypatch.context() as m:
        m.setattr(collecting._Tap, "forward", few(4, cuda))
        m.setattr(pipeline, "discard", lambda _: None)  # killed at the very end
        pipeline.calibrate(recipe, tmp_path / "a")
    assert len(list((tmp_path / "a.calibrating").glob("chunk-*"))) == 2
    (tmp_path / "a.calibrating").rename(tmp_path / "b.calibrating")
    (tmp_path / "b.calibrating" / "chunk-00001" / "statistics.safetensors").unlink()
    shutil.copytree(tmp_path / "b.calibrating", tmp_path / "c.calibrating")
    smaller = recipe.with_settings({"batch_size": 4, "save_every": 2})  # the same two chunks
    said: list[str] = []
    assert pipeline.calibrate(smaller, tmp_path / "c", said.append) is not None
    assert not any("going on" in x for x in said)
    found = pipeline.calibrate(recipe, tmp_path / "b", said.append)
    assert any("going on: 1 of 2 chunks" in x for x in said)
    assert found is not None
    close(undisturbed, found, FLOAT32)


LIMITED = """
import resource, sys
import moe_fair.pipeline, moe_fair.tables, moe_fair.report.write  # what is imported counts, too
from moe_fair.cli import main
pages = int(open("/proc/self/statm").read().split()[0])
most = pages * resource.getpagesize() + int(sys.argv[1]) * 2**20
resource.setrlimit(resource.RLIMIT_AS, (most, most))
main(sys.argv[2:])
"""


def limited(megabytes: int, *run: object) -> subprocess.CompletedProcess[str]:
    """The command with so much more memory than the imports take, as by `ulimit -v`."""
    return subprocess.run(
        [sys.executable, "-c", LIMITED, str(megabytes), *map(str, run)],
        capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"},
    )  # fmt: skip


@pytest.mark.slow
def test_a_machine_with_less_memory(tmp_path: Path) -> None:
    run = [
        "calibrate", MODEL, "-c", CALIBRATION / "python.jsonl", "--samples", 16, "--length", 512,
        "--batch-size", 16, "--no-counterfactual", "-o",
    ]  # fmt: skip
    done = limited(1100, *run, tmp_path / "less")
    assert done.returncode == 0, done.stderr
    lines = [x for x in done.stderr.splitlines() if "out of memory" in x]
    assert lines
    assert "sequences at a time instead of 16" in lines[0]
    with pytest.raises(SystemExit, match="0"):
        main([str(a) for a in (*run, tmp_path / "all")])
    close(Statistics.load(tmp_path / "all"), Statistics.load(tmp_path / "less"), FLOAT32)


# the second process alone has memory for but two sequences at a time
SECOND = """
import os, sys
sys.path[:0] = [{tests!r}, {faults!r}]
if os.environ["RANK"] == "1":
    from test_memory import collecting, cuda, few
    collecting._Tap.forward = few(2, cuda)
from moe_fair.cli import main
main(sys.argv[1:])
"""


@pytest.mark.parametrize("engine", ["resident", "streaming"])
def test_one_process_of_two_makes_do_for_itself(
    tmp_path: Path, undisturbed: Statistics, engine: str
) -> None:
    script = tmp_path / "run.py"
    tests = ROOT / "tests"
    script.write_text(SECOND.format(tests=str(tests), faults=str(tests / "faults")))
    text = [a for c in SETTINGS["calibration"] for a in ("-c", c)]
    run = [
        "calibrate", str(MODEL), *text, "--samples", "16", "--length", "12", "--dtype", "float32",
        "--no-counterfactual", "--engine", engine, "-o", str(tmp_path / "out"),
    ]  # fmt: skip
    command = [*torchrun(2)[:-2], str(script), *run]
    log = tmp_path / "log"
    assert start(command, log).wait(timeout=400) == 0, log.read_text()
    said = log.read_text()
    lines = [x for x in said.splitlines() if "out of memory" in x]
    assert len(lines) == 2
    assert "again with 4 sequences" in lines[0]
    assert "again with 2 sequences" in lines[1]
    assert all("(process 1 of 2)" in x for x in lines)
    close(undisturbed, Statistics.load(tmp_path / "out"), FLOAT32)
