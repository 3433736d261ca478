"""U-Score of experts: the collected distributions against naive outputs, shards, both engines."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from collected import families
from places import CALIBRATION, MODEL
from scipy.stats import wasserstein_distance
from test_statistics import DOMAINS, batches, expert, model_of, recorded

import moe_fair
from moe_fair.core.recipe import Recipe
from moe_fair.core.sketch import CAPACITY, DIRECTIONS, Cell, Sketch, directions
from moe_fair.core.units import Statistics
from moe_fair.engines.batch import Batch
from moe_fair.engines.layers import LayeredModel
from moe_fair.engines.resident import ResidentEngine
from moe_fair.engines.streaming import StreamingEngine
from moe_fair.moe.blocks import find_blocks
from moe_fair.moe.collector import ExpertCollector
from moe_fair.moe.criteria import criterion
from moe_fair.pipelines import moe as pipeline


def collect(engine: Any, model: Any, data: list[Batch], taylor: bool = False) -> Statistics:
    blocks = find_blocks(model)
    groups = [b.unit_group(4) for b in blocks]
    wanted = families("u_score", taylor=taylor)
    with ExpertCollector(blocks, groups, DOMAINS, wanted) as collector:
        engine.run(data, collector, backward=taylor)
    return collector.statistics()


def same(a: Statistics, b: Statistics) -> bool:
    packs = [(a.sketches[g].pack(), b.sketches[g].pack()) for g in a.sketches]
    return all(torch.equal(x[k], y[k]) for x, y in packs for k in x)


def test_scores_are_scipys_on_naive_outputs() -> None:
    model, data = model_of(), batches()
    got = collect(ResidentEngine(model), model, data)
    scores = criterion("u-score")(got)
    gated: dict[tuple[str, int, int], list[np.ndarray]] = {}
    for batch in data:
        with recorded(model) as calls, torch.no_grad():
            model(batch.input_ids, attention_mask=batch.mask)
        real = batch.mask.flatten().bool()
        for block, (m, x, ids, weights, _) in zip(find_blocks(model), calls, strict=True):
            for e in range(block.num_experts):
                g = (weights * (ids == e)).sum(1, keepdim=True).double()
                with torch.no_grad():
                    out = g * expert(m, e, x).double() @ directions(x.shape[1]).double()
                gated.setdefault((block.name, batch.domain, e), []).append(out[real].numpy())
    for block in find_blocks(model):
        for e in range(block.num_experts):
            a, b = (np.concatenate(gated[block.name, d, e]) for d in (0, 1))
            want = np.mean([wasserstein_distance(a[:, p], b[:, p]) for p in range(DIRECTIONS)])
            assert float(scores.values[block.name][e]) == pytest.approx(want, rel=2e-5), e
    assert all(c.values is not None for s in got.sketches.values() for c in s.cells.values())


def test_shards_padding_and_gradients_leave_no_trace() -> None:
    model, data = model_of(), batches()
    engine = ResidentEngine(model)
    whole = collect(engine, model, data)
    first, rest = collect(engine, model, data[:1]), collect(engine, model, data[1:])
    assert same(whole, first.merge(rest))
    assert same(whole, rest.merge(first))
    assert same(whole, collect(engine, model, data, taylor=True))
    padded = collect(engine, model, batches(pad=7))  # other rows shift the rounding of matmuls
    for name, score in criterion("u-score")(whole).values.items():
        counts = [x.sketches[name].pack()["counts"] for x in (whole, padded)]
        assert torch.equal(*counts)
        torch.testing.assert_close(
            criterion("u-score")(padded).values[name], score, rtol=1e-5, atol=0
        )


@pytest.mark.slow
def test_streaming_gives_the_same_bits_and_the_file_brings_them_back(tmp_path: Path) -> None:
    model_of().save_pretrained(tmp_path / "model")
    model = type(model_of()).from_pretrained(tmp_path / "model", dtype=torch.float32).eval()
    ids = torch.randint(3, 128, (8, 200), generator=torch.Generator().manual_seed(1))
    data = [*batches(), Batch(ids, torch.ones_like(ids), torch.arange(8) + 50, 0)]
    resident = collect(ResidentEngine(model), model, data, taylor=True)
    layered = LayeredModel(
        tmp_path / "model", model.config, dtype=torch.float32, device=torch.device("cpu")
    )
    streamed = collect(StreamingEngine(layered), layered.model, data, taylor=True)
    assert same(resident, streamed)
    counts = [c.count for s in resident.sketches.values() for c in s.cells.values()]
    assert min(counts) <= CAPACITY < max(counts)
    resident.save(tmp_path / "stats")
    loaded = Statistics.load(tmp_path / "stats")
    assert same(resident, loaded)
    name = resident.groups[0].name
    assert torch.equal(
        criterion("u-score")(loaded).values[name], criterion("u-score")(resident).values[name]
    )
    with pytest.raises(ValueError, match="fewer than two"):
        criterion("u-score")(loaded, {"b": 0.0})


@pytest.mark.slow
@pytest.mark.nightly
def test_the_sketch_is_within_a_percent_on_the_reference_model(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    recipe = Recipe(model=str(MODEL), calibration=str(CALIBRATION), samples=64, length=256)  # type: ignore[arg-type]
    source = pipeline.open_model(recipe)
    text = pipeline.calibration_set(recipe, source, print)
    model = source.load("float32", "cpu")
    with monkeypatch.context() as m:
        m.setattr("moe_fair.core.sketch.CAPACITY", 10**9)  # everything is stored
        with ExpertCollector(
            find_blocks(model), source.groups, text.domains, families("u_score", taylor=False)
        ) as collector:
            ResidentEngine(model).run(text.batches(8), collector, backward=False)
        stored = collector.statistics()
        exact = {g: s.scores(stored.tokens) for g, s in stored.sketches.items()}
    binned = 0
    for g, whole in stored.sketches.items():
        few = Sketch(whole.domains, whole.units)
        few.cells = {k: Cell.of(c.values) for k, c in whole.cells.items() if c.values is not None}
        binned += sum(c.values is None for c in few.cells.values())
        assert len(few.cells) == len(whole.cells)
        torch.testing.assert_close(few.scores(stored.tokens), exact[g], rtol=0.01, atol=0)
    assert binned > 400


@pytest.mark.slow
@pytest.mark.nightly
def test_prune_collects_what_fair_u_needs(
    tmp_path: Path, statistics_folder: Path, settings: dict[str, object]
) -> None:
    with pytest.raises(ValueError, match=r"method fair-u needs sketch.*--for fair-u"):
        moe_fair.plan(statistics_folder, experts=40, method="fair-u")
    done = moe_fair.prune(
        str(MODEL), tmp_path / "out", experts=40, method="fair-u", repair="none", **settings
    )
    assert (done.plan.removal, done.plan.protection) == ("u-score", "taylor")
    assert done.plan.allocator == "tod"
    again = moe_fair.plan(tmp_path / "out" / "moe_fair", experts=40, method="fair-u")
    assert again.kept == done.plan.kept
