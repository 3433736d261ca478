"""Layers that are larger than memory once they are unpacked: their experts stay packed."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from flow import collect, kept_experts
from packing import SCHEMES

from moe_fair.core.units import Statistics
from moe_fair.engines.layers import LayeredModel
from moe_fair.engines.packing.experts import PackedExperts
from moe_fair.engines.streaming import StreamingEngine
from moe_fair.moe.checkpoint_source import Checkpoint

QUICK = ("fp8", "W4A16")  # of the schemes


@pytest.fixture(scope="module", params=QUICK)
def source(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    folder = tmp_path_factory.mktemp("packed") / "model"
    SCHEMES[request.param](folder)
    return Checkpoint(str(folder))


def engine(source: Checkpoint, room: int | None = 0, dtype: Any = torch.float32) -> StreamingEngine:
    layered = LayeredModel(
        source.path, source.config, dtype=dtype, device=torch.device("cpu"),
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
