"""Layers that are larger than memory once they are unpacked: their experts stay packed."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from flow import batches, collect, kept_experts
from packing import SCHEMES, tensors_of

from moe_fair.core.recipe import Recipe
from moe_fair.core.units import Statistics
from moe_fair.engines.layers import LayeredModel
from moe_fair.engines.packing.experts import PackedExperts, as_plain
from moe_fair.engines.progress import Progress
from moe_fair.engines.streaming import StreamingEngine
from moe_fair.moe.blocks import find_blocks
from moe_fair.moe.checkpoint_source import Checkpoint
from moe_fair.moe.checkpoint_writer import write_model
from moe_fair.moe.layer_distillation import distill_layer
from moe_fair.moe.layer_examples import Kinds, LayerExamples
from moe_fair.moe.repacking import Repacking
from moe_fair.moe.repair import Repairer, judges
from moe_fair.moe.surgery import cut_block
from moe_fair.pipelines.calibrate import choose_engine, loading
from moe_fair.pipelines.oom_retry import RetryingEngine, layerwise_until_it_fits

CPU = torch.device("cpu")


@pytest.fixture(scope="module", params=["fp8"])
def source(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    folder = tmp_path_factory.mktemp("packed") / "model"
    SCHEMES[request.param](folder)
    return Checkpoint(str(folder))


def engine(source: Checkpoint, room: int | None = 0, dtype: Any = torch.float32) -> StreamingEngine:
    layered = LayeredModel(
        source.path, source.config, dtype=dtype, device=CPU,
        packing=source.packing, room=room,
    )  # fmt: skip
    return StreamingEngine(layered, device_bytes=20_000)


def same(a: Statistics, b: Statistics) -> None:
    for group in a.groups:
        assert a.rows[group.name].abs().sum() > 0
        assert torch.equal(a.rows[group.name], b.rows[group.name])
        for kind in ("sums", "constants"):
            its, others = (getattr(s, kind)[group.name] for s in (a, b))
            assert its.keys() == others.keys() != set()
            for name, value in its.items():
                assert torch.equal(value, others[name]), (group.name, name)


def test_only_where_memory_is_too_short(source: Checkpoint) -> None:
    for room, packed in ((0, True), (None, False)):
        with engine(source, room).layered.layer(0) as layer:
            found = {n for n, p in layer.named_parameters() if isinstance(p, PackedExperts)}
        assert found == ({"mlp.experts.gate_up_proj", "mlp.experts.down_proj"} if packed else set())


@pytest.mark.parametrize(("memory", "packed"), [("100KB", True), ("400KB", False)])
def test_the_most_that_weights_may_take_decides(
    source: Checkpoint, memory: str, packed: bool
) -> None:
    recipe = Recipe(str(source.path), max_memory=memory, dtype="float32", device="cpu")
    chosen = choose_engine(recipe, source)
    assert chosen.engine == "streaming"  # the model is larger than either
    for its in (
        RetryingEngine(loading(recipe), source, chosen, Progress("", 0)).engine,
        layerwise_until_it_fits(
            source, "streaming", loading(recipe), Progress("", 0), [("", lambda engine: engine)]
        ),
    ):
        assert isinstance(its, StreamingEngine)
        with its.layered.layer(0) as layer:
            kinds = [isinstance(p, PackedExperts) for p in layer.parameters()]
        assert any(kinds) == packed


@pytest.mark.slow
@pytest.mark.parametrize(
    ("source", "how"),
    [("fp8", "grouped_mm"), ("fp8", "eager"), ("fp8", "batched_mm"), ("W4A16", "grouped_mm")],
    indirect=["source"],
)
def test_statistics_are_those_of_the_layer_unpacked(source: Checkpoint, how: str) -> None:
    found = []
    for room in (0, None):
        its = engine(source, room)
        its.model.set_experts_implementation(how)
        found.append(collect(source, its.model, its))
    same(*found)


def test_autograd_keeps_no_expert_unpacked(source: Checkpoint) -> None:
    its, kept = engine(source), []
    block, text = find_blocks(its.model)[0], batches()[0]
    calls, [hidden] = its.embed([text])

    def keep(t: torch.Tensor) -> torch.Tensor:
        kept.append(t)
        return t

    with its.layered.layer(block.layer) as layer:
        with torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t):
            out = calls[0][block.layer].run(layer, hidden.requires_grad_(True))
        out.sum().backward()
        packed = [as_plain(p.detach()) for p in block.experts.parameters()]
    assert sum(isinstance(t, PackedExperts) for t in kept) == len(packed) == 2
    experts = [m for p in packed for e in p for m in (e, e.T)]
    for t in kept:
        if not isinstance(t, PackedExperts) and t.dim() >= 2:
            assert not any(torch.equal(part, m) for part in t for m in experts)
            assert not any(torch.equal(t, m) for m in experts)


def test_views_steps_and_writes(source: Checkpoint) -> None:
    """What goes expert by expert gives what it gives of the plain tensor, and the rest does too."""
    block = find_blocks((its := engine(source)).model)[0]
    with its.layered.layer(block.layer):
        w = block.experts.down_proj.detach()
        plain = as_plain(w)
        for f in (
            lambda t: t[2], lambda t: t[-1].T, lambda t: t[1:4].transpose(1, 2).contiguous(),
            lambda t: 2.0 * t.double(), lambda t: t.index_select(0, torch.tensor([3, 1]))[1],
            lambda t: torch.stack([x.sum() for x in t]), lambda t: t.flatten(1).split(2)[1],
            lambda t: t.sum(1), lambda t: t[:0], lambda t: torch.cat([t[:2], plain[2:]]).mT,
            lambda t: t.mean(), lambda t: t.transpose(0, 1),
        ):  # fmt: skip
            assert torch.equal(as_plain(f(w)), f(plain))
        cut, copied = w.index_select(0, torch.tensor([0, 2])), w[:3].clone()
        w[1:3].copy_(-plain[1:3])
        assert torch.equal(as_plain(w), torch.cat([plain[:1], -plain[1:3], plain[3:]]))
        assert torch.equal(as_plain(cut), plain[[0, 2]])
        assert torch.equal(copied, plain[:3])
        w.copy_(0.5 * w)
        assert torch.equal(as_plain(w)[0], 0.5 * plain[0])


def repaired(source: Checkpoint, kind: str, room: int | None, folder: Path) -> Path:
    """What a repair of the cut model is written as."""
    kept = kept_experts(source, True)
    folder.mkdir(parents=True)
    (folder / "layers").mkdir()
    repairer = Repairer(
        engine(source, room), kept, kind, folder=folder / "layers",
        repacking=Repacking(source, kept),
    )  # fmt: skip
    done = repairer.run(batches())
    assert any(d.repair != "none" for d in done)
    write_model(source, kept, folder / "out", repaired=folder / "layers")
    return folder / "out"


@pytest.mark.slow
@pytest.mark.parametrize(
    ("source", "kind"), [("fp8", "scale"), ("fp8", "refit"), ("W4A16", "refit")],
    indirect=["source"],
)  # fmt: skip
def test_a_repair_is_that_of_the_layer_unpacked(
    source: Checkpoint, kind: str, tmp_path: Path
) -> None:
    a, b = (
        tensors_of(repaired(source, kind, room, tmp_path / str(room) / "x")) for room in (0, None)
    )
    assert a.keys() == b.keys()
    for name in a:
        assert torch.equal(a[name].view(torch.uint8), b[name].view(torch.uint8)), name


@pytest.mark.slow
@pytest.mark.parametrize("part", [(0, 1), (1, 2)])
@pytest.mark.parametrize("source", ["fp8"], indirect=True)
def test_trained_as_the_layer_unpacked(source: Checkpoint, part: tuple[int, int]) -> None:
    found = []
    for room in (0, None):
        its = engine(source, room)
        text = batches()
        block = find_blocks(its.model)[0]
        calls, hidden = its.embed(text)
        step = [row[block.layer] for row in calls]
        with its.layered.layer(block.layer) as layer, torch.no_grad():
            cut_block(block, [0, 1, 2, 5])
            wanted = [2 * c.run(layer, x) - x for c, x in zip(step, hidden, strict=True)]
            examples = LayerExamples(layer, step, Kinds(text, judges, CPU), hidden, wanted)
            assert distill_layer(examples, block, epochs=part[1], look=False, part=part).epoch
            found.append({n: as_plain(p.detach()).clone() for n, p in layer.named_parameters()})
    for name, values in found[0].items():
        assert torch.equal(values, found[1][name]), name
