"""Heads of an attention with one layer for queries, keys and values; gated MLPs."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from moe_fair.vision.checkpoint import load_pruned, save_pruned
from moe_fair.vision.graph import HEADS
from moe_fair.vision.load import Source
from moe_fair.vision.preprocessing import Preprocessing
from moe_fair.vision.proof import find_groups, uneven_plan
from moe_fair.vision.size import Sizes
from moe_fair.vision.surgery import cut, cuts_of

BASE = {"kind": "function", "module": "vision.test_fused", "function": "net", "arguments": [],
        "keywords": {}}  # fmt: skip


class Attention(nn.Module):
    """As timm has it: `order` is how the heads lie in the rows of `qkv`."""

    def __init__(self, dim: int, heads: int, order: str) -> None:
        super().__init__()
        self.num_heads, self.head_dim, self.attn_dim = heads, 4, heads * 4
        self.qkv, self.proj = nn.Linear(dim, 3 * heads * 4), nn.Linear(heads * 4, dim)
        self.order = order

    def forward(self, x: Tensor) -> Tensor:
        b, n, dim = x.shape
        if self.order == "heads first":
            qkv = self.qkv(x).reshape(b, n, self.num_heads, 3, self.head_dim)
            q, k, v = qkv.permute(3, 0, 2, 1, 4).unbind(0)
        else:
            qkv = self.qkv(x).reshape(b, n, 3, self.num_heads, self.head_dim)
            q, k, v = qkv.permute(2, 0, 3, 1, 4).unbind(0)
        x = nn.functional.scaled_dot_product_attention(q, k, v).transpose(1, 2)
        return self.proj(x.reshape(b, n, dim if self.order == "of the input" else self.attn_dim))


class Gated(nn.Module):
    """Half of the first layer opens the other half."""

    def __init__(self, dim: int, hidden: int) -> None:
        super().__init__()
        self.w12, self.w3 = nn.Linear(dim, 2 * hidden), nn.Linear(hidden, dim)

    def forward(self, x: Tensor) -> Tensor:
        gate, value = self.w12(x).chunk(2, dim=-1)
        return self.w3(nn.functional.silu(gate) * value)


class Transformer(nn.Module):
    """One block on patches of 4 × 4."""

    def __init__(self, order: str) -> None:
        super().__init__()
        self.patch, self.norm = nn.Conv2d(3, 12, 4, stride=4), nn.LayerNorm(12)
        self.attn, self.mlp = Attention(12, 3, order), Gated(12, 10)
        self.head = nn.Linear(12, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.patch(x).flatten(2).transpose(1, 2)
        x = x + self.attn(self.norm(x))
        x = x + self.mlp(self.norm(x))
        return self.head(x.mean(1))


def net(order: str = "") -> nn.Module:
    torch.manual_seed(0)
    return Transformer(order).eval()


def test_the_cut_net_is_the_one_whose_heads_and_units_are_silenced(tmp_path: Path) -> None:
    model, x = net(), torch.rand(2, 3, 16, 16)
    graph = find_groups(model, x, heads=True)
    assert {g.name: g.units.size for g in graph.groups} == {"attn.qkv": 3, "mlp.w12": 10}
    kept = {**uneven_plan(graph.groups, seed=1), "attn.qkv": [0, 2]}
    silenced = copy.deepcopy(model)
    with torch.no_grad():
        silenced.attn.proj.weight[:, 4:8] = 0  # type: ignore[union-attr, index, operator]
        silenced.mlp.w3.weight[:, sorted(set(range(10)) - set(kept["mlp.w12"]))] = 0  # type: ignore[union-attr, index, operator]
    small, cuts = copy.deepcopy(model), cuts_of(graph.groups, kept)
    predicted = Sizes(model, graph.groups, x).at({n: len(ids) for n, ids in kept.items()})
    cut(small, cuts)
    assert small.attn.num_heads == 2  # type: ignore[union-attr]
    assert predicted.parameters == sum(p.numel() for p in small.parameters())
    with torch.no_grad():
        torch.testing.assert_close(small(x), silenced(x), rtol=1e-5, atol=1e-6)
    pixels = Preprocessing(3, 16)
    save_pruned(small, Source(small, BASE, pixels, pixels, None, None), [cuts], tmp_path)
    with torch.no_grad():
        assert torch.equal(load_pruned(tmp_path, trust_remote_code=True)(x), small(x))


def test_heads_are_left_whole_unless_asked() -> None:
    graph = find_groups(net(), torch.rand(2, 3, 16, 16))
    assert [g.name for g in graph.groups] == ["mlp.w12"]
    assert graph.whole["attn.qkv"] == HEADS


@pytest.mark.parametrize(
    ("order", "why"),
    [
        ("heads first", "the cut model differs from the masked one"),
        ("of the input", "the cut model does not run"),
    ],
)
def test_what_only_looks_like_them_stays_whole(order: str, why: str) -> None:
    graph = find_groups(net(order), torch.rand(2, 3, 16, 16), heads=True)
    assert [g.name for g in graph.groups] == ["mlp.w12"]
    assert graph.whole["attn.qkv"].startswith(why)


def test_heads_that_an_attention_does_not_have() -> None:
    for ids in ([3], [0, 1, 2]):
        with pytest.raises(ValueError, match=f"cannot take {len(ids)} heads out of its 3"):
            cut(net(), [("attn", "heads", ids)])
    with pytest.raises(ValueError, match="out of its None"):
        cut(net(), [("mlp", "heads", [0])])
