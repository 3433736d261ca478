"""NAEE-style reconstruction: the objective against layer outputs, the sets against brute force."""

from __future__ import annotations

from itertools import combinations
from math import comb
from pathlib import Path

import numpy as np
import pytest
import torch
from collected import families
from flow import DOMAINS, batches, original
from places import CALIBRATION, MODEL
from tiny import tiny_model

from moe_fair.cli import main
from moe_fair.core.allocate import naee
from moe_fair.core.greedy import greedy
from moe_fair.core.plan import Plan
from moe_fair.core.ranking import rank
from moe_fair.core.recipe import Recipe
from moe_fair.core.units import Scores, Statistics, UnitGroup
from moe_fair.engines.layers import LayeredModel
from moe_fair.engines.resident import ResidentEngine
from moe_fair.engines.streaming import StreamingEngine
from moe_fair.moe.block_recorder import BlockRecorder
from moe_fair.moe.blocks import find_blocks
from moe_fair.moe.checkpoint_source import Checkpoint
from moe_fair.moe.collector import ExpertCollector
from moe_fair.moe.statistics import gram as gram_family
from moe_fair.pipelines import moe as pipeline

SMALL = ["-c", str(CALIBRATION), "--samples", "8", "--length", "64", "--batch-size", "4"]


def saved(folder: Path, kind: str = "qwen2_moe", experts: int = 8) -> Checkpoint:
    tiny_model(kind, num_experts=experts).save_pretrained(folder)
    return Checkpoint(str(folder))


def grams(source: Checkpoint, model: torch.nn.Module, engine: object) -> Statistics:
    """Statistics of `batches()`, of which one is padded, with Gram matrices."""
    wanted = families("gram", taylor=False)
    collector = ExpertCollector(find_blocks(model), source.groups, DOMAINS, wanted)
    with collector:
        engine.run(batches(), collector, backward=False)  # type: ignore[attr-defined]
    found = collector.statistics()
    found.metadata |= {"size": {"parameters": 1, "bytes": 1}, "calibration": {}}
    return found


def random_gram(size: int, seed: int) -> np.ndarray:
    """Of sparse outputs, as of experts of which few see each token."""
    g = np.random.default_rng(seed)
    v = g.normal(size=(200, size, 4)) * (g.random((200, size, 1)) < 0.3)
    v = v + 0.3 * g.normal(size=4)  # with something in common
    return np.einsum("ted,tfd->ef", v, v)


@pytest.mark.parametrize("most", [20_000, 0])
def test_the_objective_is_the_change_of_the_layers_output(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, most: int
) -> None:
    monkeypatch.setattr(naee, "MOST_SETS", most)
    monkeypatch.setattr(gram_family, "CELLS", 7 * 4 * 64)  # several chunks of tokens
    source = saved(tmp_path / "m")
    model = original(source)
    statistics = grams(source, model, ResidentEngine(model))
    plan = pipeline.plan(statistics, Recipe(experts=5, method="naee"))
    assert set(plan.explanation["search"].values()) == {"exhaustive" if most else "greedy"}
    for block in find_blocks(model):
        [group] = [g for g in plan.groups if g.name == block.name]
        assert len(group.kept) == 5
        watch, changed, whole = BlockRecorder(block), 0.0, 0.0
        for batch in batches():
            with watch, torch.no_grad():
                model(input_ids=batch.input_ids, attention_mask=batch.mask, use_cache=False)
            # the layer's own experts, the weights of the removed ones set to zero
            gone = ~torch.isin(watch.index, torch.tensor(group.kept))
            with torch.no_grad():
                rest = block.experts(watch.x, watch.index, watch.weights.masked_fill(gone, 0.0))
            real = batch.mask.flatten().bool()
            changed += float((watch.y - rest)[real].double().square().sum())
            whole += float(watch.y[real].double().square().sum())
        assert changed > 0
        assert plan.explanation["relative_error"][block.name] == pytest.approx(
            changed / whole, rel=1e-5
        )


def test_streaming_gives_the_same_gram_and_normal_runs_have_none(tmp_path: Path) -> None:
    source = saved(tmp_path / "m")
    model = original(source)
    layered = LayeredModel(
        source.path, source.config, dtype=torch.float32, device=torch.device("cpu")
    )
    a = grams(source, model, ResidentEngine(model))
    b = grams(source, layered.model, StreamingEngine(layered))
    for group in source.groups:
        gram = a.sums[group.name]["gated_gram"]
        assert torch.equal(gram, b.sums[group.name]["gated_gram"])
        diagonal = gram.diagonal(dim1=1, dim2=2)
        torch.testing.assert_close(diagonal, a.sums[group.name]["gated_norm_sq"])
        assert bool((gram != torch.diag_embed(diagonal)).any())
    wanted = families(taylor=False)
    collector = ExpertCollector(find_blocks(model), source.groups, DOMAINS, wanted)
    with collector:
        ResidentEngine(model).run(batches(), collector, backward=False)
    assert all("gated_gram" not in s for s in collector.statistics().sums.values())


@pytest.mark.parametrize("count", [1, 2, 4, 6])
def test_exhaustive_finds_the_optimum_of_eight(count: int) -> None:
    for seed in range(5):
        gram = random_gram(8, seed)
        least = min(sum(gram[e, f] for e in s for f in s) for s in combinations(range(8), count))
        assert naee.error(gram, naee.exhaustive(gram, count)) == pytest.approx(least)
        assert naee.error(gram, greedy(gram)[0][:count]) >= least * (1 - 1e-12)


def test_greedy_takes_what_adds_least() -> None:
    gram = random_gram(10, 3)
    order = greedy(gram)[0]
    assert sorted(order) == list(range(10))
    for n in range(10):
        others = [e for e in range(10) if e not in order[:n]]
        added = {e: naee.error(gram, [*order[:n], e]) for e in others}
        assert added[order[n]] == pytest.approx(min(added.values()), rel=1e-9, abs=1e-9)


def test_exhaustive_where_there_are_few_sets_and_equal_counts_in_routing_groups() -> None:
    groups = (
        UnitGroup("a", 0, 12, 2),
        UnitGroup("b", 1, 40, 2),
        UnitGroup("c", 2, 12, 4, blocks=4),
    )
    made = {g.name: random_gram(g.size, i) for i, g in enumerate(groups)}
    scores = Scores("naee", {g.name: torch.zeros(g.size, dtype=torch.float64) for g in groups})
    ranked = rank(groups, scores, inputs={n: {"gram": m} for n, m in made.items()})
    budget = naee.allocate(ranked, remove=32)
    assert budget.explanation["search"] == {"a": "exhaustive", "b": "greedy", "c": "greedy"}
    gone = {r.group.name: budget.orders[r.group.name][: r.group.size - budget.kept[r.group.name]]
            for r in ranked}  # fmt: skip
    assert sum(map(len, gone.values())) == 32
    assert comb(40, len(gone["b"])) > naee.MOST_SETS
    per_run = np.bincount(gone["c"] // 3, minlength=4)
    assert len(set(per_run.tolist())) == 1
    for r in ranked:
        assert sorted(budget.orders[r.group.name].tolist()) == list(range(r.group.size))
    with pytest.raises(ValueError, match="needs the Gram matrix"):
        naee.allocate(rank(groups, scores), remove=32)


@pytest.mark.slow
def test_the_command_collects_what_it_needs_or_says_so(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def run(*arguments: object) -> int:
        with pytest.raises(SystemExit) as stop:
            main([str(a) for a in arguments])
        return int(stop.value.code or 0)

    fast = [*SMALL, "--no-taylor", "--no-counterfactual", "--repair", "none"]
    out = tmp_path / "out"
    assert run("prune", MODEL, "--experts", 40, "--method", "naee", *fast, "-o", out) == 0
    plan = Plan.load(out / "moe_fair" / "plan.json")
    assert (plan.allocator, plan.removal, plan.uniform) == ("naee", "naee", True)
    saved_statistics = Statistics.load(out / "moe_fair")
    for group in plan.groups:
        gram = saved_statistics.sums[group.name]["gated_gram"].sum(0).numpy()
        gone = sorted(set(range(60)) - set(group.kept))
        assert gone == sorted(greedy(gram)[0][:20])
    assert run("calibrate", MODEL, *fast[:-2], "-o", tmp_path / "without") == 0
    capsys.readouterr()
    assert run("plan", tmp_path / "without", "--experts", 40, "--method", "naee") == 2
    assert "--for naee" in capsys.readouterr().err
