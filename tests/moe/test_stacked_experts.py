"""A family whose experts are a module each is refused: a cut would take rows out of every one."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
from torch import nn

from moe_fair.moe import blocks
from moe_fair.moe.blocks import Axis, MoeBlock, find_blocks


class Separate(nn.Module):
    """Four experts of eight rows each, which four divides."""

    def __init__(self) -> None:
        super().__init__()
        self.experts = nn.ModuleList(nn.Linear(6, 8) for _ in range(4))
        self.experts.num_experts = 4
        self.gate = nn.Linear(6, 4)


def _view(name: str, block: nn.Module) -> MoeBlock:
    return MoeBlock(name, 0, block, block.experts, block.gate, (Axis(block.gate, "weight", 0),), 2)


def test_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    family = SimpleNamespace(blocks=("Separate",), view=_view)
    monkeypatch.setattr(blocks, "families", lambda: {"separate": family})
    with pytest.raises(ValueError, match=r"0\.mlp: its experts are 4 modules; only experts that"):
        find_blocks(nn.ModuleDict({"0": nn.ModuleDict({"mlp": Separate()})}))
