"""Layers that are larger than memory once they are unpacked: their experts stay packed."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from flow import batches, collect, kept_experts
from packing import SCHEMES, tensors_of

from moe_fair.core.units import Statistics
from moe_fair.engines.layers import LayeredModel
from moe_fair.engines.packing.experts import PackedExperts, as_plain
from moe_fair.engines.streaming import StreamingEngine
from moe_fair.moe.blocks import find_blocks
from moe_fair.moe.checkpoint_source import Checkpoint
from moe_fair.moe.checkpoint_writer import write_model
from moe_fair.moe.layer_distillation import distill_layer
from moe_fair.moe.layer_examples import Kinds, LayerExamples
from moe_fair.moe.repacking import Repacking
from moe_fair.moe.repair import Repairer, judges
from moe_fair.moe.surgery import cut_block

QUICK = ("fp8", "W4A16")  # of the schemes
CPU = torch.device("cpu")


@pytest.fixture(scope="module", params=QUICK)
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
            assert its.keys() == others.keys() and its
            for name, value in its.items():
                assert torch.equal(value, others[name]), (group.name, name)


@pytest.mark.parametrize("how", ["grouped_mm", "eager", "batched_mm"])
def test_statistics_are_those_of_the_layer_unpacked(source: Checkpoint, how: str) -> None:
    found = []
    for room in (0, None):
        its = engine(source, room)
        its.model.set_experts_implementation(how)
        found.append(collect(source, its.model, its))
    same(*found)


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


@pytest.mark.parametrize("kind", ["scale", "refit"])
def test_a_repair_is_that_of_the_layer_unpacked(
    source: Checkpoint, kind: str, tmp_path: Path
) -> None:
    a, b = (
        tensors_of(repaired(source, kind, room, tmp_path / str(room) / "x")) for room in (0, None)
    )
    assert a.keys() == b.keys()
    for name in a:
        assert torch.equal(a[name].view(torch.uint8), b[name].view(torch.uint8)), name


@pytest.mark.parametrize("part", [(0, 1), (1, 2)])
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
            assert distill_layer(examples, block, epochs=4, look=False, part=part).epoch
            found.append({n: as_plain(p.detach()).clone() for n, p in layer.named_parameters()})
    for name, values in found[0].items():
        assert torch.equal(values, found[1][name]), name
