"""Out of memory: smaller batches, then one layer at a time, and the same statistics."""

from __future__ import annotations

import errno
import json
import os
import shutil
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from places import CALIBRATION, HELDOUT, MODEL
from processes import Python, limited, port
from tiny import tiny_model

from moe_fair.cli import main
from moe_fair.core.recipe import Recipe
from moe_fair.core.units import Statistics
from moe_fair.engines.batch import Batch
from moe_fair.engines.oom import out_of_memory
from moe_fair.engines.processes import ALONE
from moe_fair.engines.reading import Reader, SharedReader
from moe_fair.engines.shards import stored_tensors
from moe_fair.moe import collector as collecting
from moe_fair.moe.checkpoint_source import Checkpoint
from moe_fair.pipelines import moe as pipeline

Fails = Callable[..., str]
Make = Callable[..., Recipe]


@pytest.fixture(scope="module")
def recipe(tmp_path_factory: pytest.TempPathFactory) -> Make:
    """Settings for a small model: 8 sequences of each of two domains, in one batch each."""
    folder = tmp_path_factory.mktemp("small") / "model"
    vocabulary = json.loads((MODEL / "config.json").read_text())["vocab_size"]
    tiny_model("qwen2_moe", vocab_size=vocabulary).save_pretrained(folder)
    for file in MODEL.glob("tokenizer*"):
        shutil.copy(file, folder)

    def make(**settings: Any) -> Recipe:
        text = tuple(str(CALIBRATION / f"{n}.jsonl") for n in ("python", "rust-docs"))
        given = {"model": str(folder), "calibration": text, "samples": 16, "length": 12}
        return Recipe(**{**given, "dtype": "float32", **settings})

    return make


@pytest.fixture(scope="module")
def undisturbed(recipe: Make) -> Statistics:
    found = pipeline.calibrate(recipe())
    assert found is not None
    return found


def lack(
    patch: pytest.MonkeyPatch, limit: int, error: Callable[[], Exception], engine: str | None = None
) -> None:
    """Memory for so many sequences at a time: the forward of the last block's experts, or the
    backward of the first's, when all others have been booked, raises the error.

    Args:
        engine: where this is so; None: in both.
    """
    forward, backward = collecting._BlockCollector.forward, collecting._BatchAccumulator.backward

    def short(tap: Any) -> bool:
        streaming = any(b.experts.down_proj.is_meta for b in tap.collector.blocks)
        here = engine is None or streaming == (engine == "streaming")
        return here and len(tap.collector.batch.mask) > limit

    def first(self: Any, *arguments: torch.Tensor) -> torch.Tensor:
        if error is not cuda and self is self.collector._taps[-1] and short(self):
            raise error()
        return forward(self, *arguments)

    def last(self: Any, gradient: torch.Tensor) -> None:
        if error is cuda and self.tap is self.tap.collector._taps[0] and short(self.tap):
            raise error()
        backward(self, gradient)

    patch.setattr(collecting._BlockCollector, "forward", first)
    patch.setattr(collecting._BatchAccumulator, "backward", last)


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


@pytest.mark.slow
@pytest.mark.parametrize(("limit", "error"), [(5, cpu), (5, MemoryError), (1, cuda)])
def test_smaller_batches(
    monkeypatch: pytest.MonkeyPatch, recipe: Make, undisturbed: Statistics, limit: int,
    error: Callable[[], Exception],
) -> None:  # fmt: skip
    lack(monkeypatch, limit, error)
    said: list[str] = []
    found = pipeline.calibrate(recipe(), say=said.append)
    assert found is not None
    lines = [x for x in said if "out of memory" in x]
    halves = {5: [(4, 8)], 1: [(4, 8), (2, 4), (1, 2)]}[limit]
    assert len(lines) == len(halves)
    for line, (new, old) in zip(lines, halves, strict=True):
        assert f"again with {new} sequences at a time instead of {old}" in line
        assert "\n" not in line
    close(undisturbed, found, FLOAT32)
    fair = Recipe(ratio=0.25, method="fair")
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


@pytest.mark.slow
@pytest.mark.parametrize("limit", [4, 1])
def test_in_float64_nothing_but_the_last_digits_differ(
    monkeypatch: pytest.MonkeyPatch, recipe: Make, limit: int
) -> None:
    with exact():
        whole = pipeline.calibrate(recipe())
        lack(monkeypatch, limit, cuda)
        parts = pipeline.calibrate(recipe())
    assert whole is not None
    assert parts is not None
    close(whole, parts, 1e-12)


@pytest.mark.slow
@pytest.mark.parametrize("when", ["running", "loading"])
def test_one_layer_at_a_time_gives_the_same_bits(
    monkeypatch: pytest.MonkeyPatch, recipe: Make, undisturbed: Statistics, when: str
) -> None:
    if when == "running":
        lack(monkeypatch, 0, cuda, "resident")
    else:
        monkeypatch.setattr(Checkpoint, "load", lambda *_: (_ for _ in ()).throw(cuda()))
    said: list[str] = []
    found = pipeline.calibrate(recipe(), say=said.append)
    assert found is not None
    lines = [x for x in said if "out of memory" in x]
    assert len(lines) == (4 if when == "running" else 1)
    assert "again with the streaming engine, one layer at a time" in lines[-1]
    assert same(found, undisturbed)


@pytest.mark.slow
def test_streaming_in_smaller_batches(
    monkeypatch: pytest.MonkeyPatch, recipe: Make, undisturbed: Statistics
) -> None:
    lack(monkeypatch, 2, cuda)
    said: list[str] = []
    found = pipeline.calibrate(recipe(engine="streaming"), say=said.append)
    assert found is not None
    assert sum("out of memory" in x for x in said) == 2
    close(undisturbed, found, FLOAT32)


@pytest.mark.slow
def test_nothing_smaller_to_try(
    monkeypatch: pytest.MonkeyPatch, recipe: Make, fails: Fails, tmp_path: Path
) -> None:
    lack(monkeypatch, 0, cuda)
    run = ["calibrate", recipe().model, "-c", CALIBRATION, "--samples", 4, "--length", 16, "-o"]
    said = fails(*run, tmp_path / "stats")
    assert "nothing smaller to try than one sequence of 16 tokens with the streaming engine" in said
    assert "give a smaller --length" in said
    assert not (tmp_path / "stats").exists()


def test_other_errors_are_not_taken_for_it(
    monkeypatch: pytest.MonkeyPatch, recipe: Make, undisturbed: Statistics
) -> None:
    def wrong() -> Exception:
        return RuntimeError("mat1 and mat2 shapes cannot be multiplied")

    lack(monkeypatch, 0, wrong)
    with pytest.raises(RuntimeError, match="mat1 and mat2"):
        pipeline.calibrate(recipe())
    assert out_of_memory(OSError(errno.ENOMEM, os.strerror(errno.ENOMEM)))
    assert not out_of_memory(OSError(errno.EIO, os.strerror(errno.EIO)))
    assert not out_of_memory(ValueError("out of memory"))


def test_held_out_losses_too(monkeypatch: pytest.MonkeyPatch, recipe: Make) -> None:
    """Logits of more than two windows do not fit."""
    from moe_fair.engines import resident
    from moe_fair.pipelines.moe import heldout_set, measure

    chosen = recipe(heldout=(str(HELDOUT),), heldout_samples=6)
    source = pipeline.open_model(chosen)
    text = heldout_set(chosen, source)
    assert text is not None
    whole = measure(chosen, source, text, "whole")
    stock = resident.ResidentEngine._logits

    def logits(self: Any, batch: Batch) -> torch.Tensor:
        if len(batch.mask) > 2:
            raise cuda()
        return stock(self, batch)

    monkeypatch.setattr(resident.ResidentEngine, "_logits", logits)
    parts = measure(chosen, source, text, "parts")
    assert parts.tokens == whole.tokens
    assert parts.mean == pytest.approx(whole.mean, rel=1e-6)


def test_removals_in_smaller_batches(
    monkeypatch: pytest.MonkeyPatch, recipe: Make, tmp_path: Path
) -> None:
    """Measured removals: what a killed run has left is the same of whole batches and of parts."""
    from moe_fair.engines import layer_calls
    from moe_fair.pipelines.opening import calibration_set
    from moe_fair.pipelines.removal_losses import Removals

    chosen = recipe(samples=8, batch_size=4)
    source = pipeline.open_model(chosen)
    text = calibration_set(chosen, source, print)
    [first, *_, last] = source.blocks
    sets = {b.name: [[e] for e in range(0, b.num_experts, 3)] for b in (first, last)}
    whole = Removals(chosen, source, text, sets, None)
    whole.measure("removing")
    stock, room = layer_calls.LayerCall.run, [2]

    def run(self: Any, layer: Any, hidden: torch.Tensor) -> torch.Tensor:
        if len(hidden) > room[0]:
            raise cuda()
        return stock(self, layer, hidden)

    monkeypatch.setattr(layer_calls.LayerCall, "run", run)
    said: list[str] = []
    parts = Removals(chosen, source, text, sets, tmp_path)
    parts.measure("removing", said.append)
    assert [line.split(": ")[-1] for line in said] == [
        "again with 2 sequences at a time instead of 4"
    ]
    assert parts.loss == pytest.approx(whole.loss, rel=1e-6)
    for name, changes in whole.by_batch.items():
        torch.testing.assert_close(parts.by_batch[name], changes, rtol=1e-3, atol=1e-3)
    assert Removals(chosen, source, text, sets, tmp_path).earlier == 2  # nothing is left to do

    room[0] = 0
    with pytest.raises(ValueError, match="nothing smaller to try than one sequence"):
        Removals(chosen, source, text, sets, None).measure("removing")


@pytest.mark.slow
def test_a_killed_run_goes_on_and_other_batch_sizes_do_not_mix(
    monkeypatch: pytest.MonkeyPatch, recipe: Make, undisturbed: Statistics, tmp_path: Path
) -> None:
    """Chunks made with less memory belong to the batch size that was asked for, and no other."""
    whole = recipe(save_every=1)
    with monkeypatch.context() as m:
        lack(m, 4, cuda)
        m.setattr(pipeline, "discard", lambda _: None)  # killed at the very end
        pipeline.calibrate(whole, tmp_path / "a")
    assert len(list((tmp_path / "a.calibrating").glob("chunk-*"))) == 2
    (tmp_path / "a.calibrating").rename(tmp_path / "b.calibrating")
    (tmp_path / "b.calibrating" / "chunk-00001" / "statistics.safetensors").unlink()
    shutil.copytree(tmp_path / "b.calibrating", tmp_path / "c.calibrating")
    smaller = whole.with_settings({"batch_size": 4, "save_every": 2})  # the same two chunks
    said: list[str] = []
    assert pipeline.calibrate(smaller, tmp_path / "c", said.append) is not None
    assert not any("going on" in x for x in said)
    found = pipeline.calibrate(whole, tmp_path / "b", said.append)
    assert any("going on: 1 of 2 chunks" in x for x in said)
    assert found is not None
    assert undisturbed.fingerprint != found.fingerprint  # of another --save-every
    close(replace(undisturbed, fingerprint=found.fingerprint), found, FLOAT32)


@pytest.mark.slow
@pytest.mark.nightly
def test_a_machine_with_less_memory(tmp_path: Path) -> None:
    run = [
        "calibrate", MODEL, "-c", CALIBRATION / "python.jsonl", "--samples", 16, "--length", 512,
        "--batch-size", 16, "--no-counterfactual", "-o",
    ]  # fmt: skip
    done = limited(1100, *run, tmp_path / "less", env=os.environ)
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
if os.environ["RANK"] == "1":
    import pytest
    from test_memory import cuda, lack
    lack(pytest.MonkeyPatch(), 2, cuda)
from moe_fair.cli import main
main(sys.argv[1:])
"""


@pytest.mark.slow
@pytest.mark.parametrize("engine", ["resident", "streaming"])
@pytest.mark.nightly
def test_one_process_of_two_makes_do_for_itself(
    tmp_path: Path, recipe: Make, undisturbed: Statistics, engine: str
) -> None:
    settings = recipe()
    text = [a for c in settings.calibration for a in ("-c", c)]
    run = [
        "calibrate", str(settings.model), *text, "--samples", "16", "--length", "12", "--dtype",
        "float32", "--engine", engine, "-o", str(tmp_path / "out"),
    ]  # fmt: skip
    both, where = [], {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port(), "WORLD_SIZE": "2"}
    where |= {**os.environ, "PYTHONPATH": str(Path(__file__).parent), "OMP_NUM_THREADS": "1"}
    for rank in ("0", "1"):
        log = tmp_path / f"log{rank}"
        both.append(Python(["-c", SECOND, *run], log, env=where | {"RANK": rank}))
    assert [p.wait(timeout=400) for p in both] == [0, 0], (tmp_path / "log1").read_text()
    said = "".join((tmp_path / f"log{rank}").read_text() for rank in (0, 1))
    lines = [x for x in said.splitlines() if "out of memory" in x]
    assert len(lines) == 2
    assert "again with 4 sequences" in lines[0]
    assert "again with 2 sequences" in lines[1]
    assert all("(process 1 of 2)" in x for x in lines)
    close(undisturbed, Statistics.load(tmp_path / "out"), FLOAT32)


@pytest.fixture
def no_threads() -> Iterator[None]:
    """Stacks that no machine has: whoever starts a thread fails as where memory is short."""
    before = threading.stack_size(2**46)
    with pytest.raises(RuntimeError, match="can't start new thread"):
        threading.Thread(target=print).start()
    yield
    threading.stack_size(before)


def test_statistics_are_saved_where_no_thread_can_be_started(
    tmp_path: Path, undisturbed: Statistics, no_threads: None
) -> None:
    undisturbed.save(tmp_path / "out")
    assert same(Statistics.load(tmp_path / "out"), undisturbed)


@pytest.mark.parametrize("reads", [Reader(), SharedReader(ALONE)])
def test_layers_are_read_where_no_thread_can_be_started(reads: Reader, no_threads: None) -> None:
    tensors = stored_tensors(MODEL / "model.safetensors")
    for group, wanted in enumerate((tensors[:2], tensors[2:3])):
        reads.ahead(group, wanted)
        brought = reads.bring(group, wanted)
        assert [(t.name, t.bytes) for t in brought] == [(t.name, t.bytes) for t in wanted]
