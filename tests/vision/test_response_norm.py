"""Global response normalisation, as three libraries write it: recognised, cut, scored."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from moe_fair.vision.checkpoint import load_pruned, save_pruned
from moe_fair.vision.collect import collect, taylor
from moe_fair.vision.load import Source
from moe_fair.vision.oracle import loss_changes
from moe_fair.vision.preprocessing import Preprocessing
from moe_fair.vision.proof import find_groups, uneven_plan
from moe_fair.vision.response_norm import response_norm
from moe_fair.vision.size import Sizes
from moe_fair.vision.surgery import cut, cuts_of
from moe_fair.vision.unit_outputs import MeasureConfig

HERE = "vision.test_response_norm"
HIDDEN, TINY = 20, 1e-6


class Last(nn.Module):
    """[S, H, W, C], ε an attribute, as timm has it."""

    def __init__(self, channels: int = HIDDEN) -> None:
        super().__init__()
        self.eps = 1e-6
        self.weight = nn.Parameter(torch.zeros(channels))
        self.bias = nn.Parameter(torch.zeros(channels))

    def forward(self, x: Tensor) -> Tensor:
        g = x.norm(p=2, dim=(1, 2), keepdim=True)
        n = g / (g.mean(dim=-1, keepdim=True) + self.eps)
        return x + torch.addcmul(self.bias.view(1, 1, 1, -1), self.weight.view(1, 1, 1, -1), x * n)


class Paper(nn.Module):
    """ε in the code, parameters of four axes, β before γ, as the paper's code and transformers'."""

    def __init__(self, channels: int = HIDDEN) -> None:
        super().__init__()
        self.beta = nn.Parameter(torch.zeros(1, 1, 1, channels))
        self.gamma = nn.Parameter(torch.zeros(1, 1, 1, channels))

    def forward(self, hidden: Tensor) -> Tensor:
        g = torch.norm(hidden, p=2, dim=(1, 2), keepdim=True)
        n = g / (g.mean(dim=-1, keepdim=True) + 1e-6)
        return self.gamma * (hidden * n) + self.beta + hidden


class First(nn.Module):
    """[S, C, H, W], without β, ε under another name."""

    def __init__(self, channels: int = HIDDEN) -> None:
        super().__init__()
        self.small = 1e-5
        self.a = nn.Parameter(torch.zeros(1, channels, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        g = x.pow(2).sum((2, 3), keepdim=True).sqrt()
        return self.a * x * (g / (g.mean(1, keepdim=True) + self.small)) + x


class Median(Last):
    """Another normalisation: not to be taken for one of these."""

    def forward(self, x: Tensor) -> Tensor:
        g = x.norm(p=2, dim=(1, 2), keepdim=True)
        return x + self.weight * x * g / (g.median(-1, keepdim=True).values + self.eps) + self.bias


class Net(nn.Module):
    """A stem, a block with the normalisation between its layers, and a head."""

    def __init__(self, norm: nn.Module, last: bool) -> None:
        super().__init__()
        self.stem, self.norm = nn.Conv2d(3, 8, 4, 4), norm
        wide = nn.Linear(8, HIDDEN) if last else nn.Conv2d(8, HIDDEN, 1)
        back = nn.Linear(HIDDEN, 8) if last else nn.Conv2d(HIDDEN, 8, 1)
        self.wide, self.back, self.last = wide, back, last
        self.layer_norm, self.head = nn.LayerNorm(8), nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        y = x.permute(0, 2, 3, 1) if self.last else x
        y = self.back(self.norm(nn.functional.gelu(self.wide(y))))
        x = x + (y.permute(0, 3, 1, 2) if self.last else y)
        return self.head(self.layer_norm(x.mean((2, 3))))


def last() -> nn.Module:
    return Net(Last(), True)


def paper() -> nn.Module:
    return Net(Paper(), True)


def first() -> nn.Module:
    return Net(First(), False)


KINDS = ["last", "paper", "first"]


def made(name: str) -> tuple[nn.Module, Tensor]:
    torch.manual_seed(0)
    net = globals()[name]().eval()
    with torch.no_grad():
        for p in net.norm.parameters():
            p.normal_()
    return net, torch.rand(2, 3, 32, 32)


def absent(net: nn.Module, gone: list[int]) -> nn.Module:
    """A copy in which these hidden units were never there, their place in the mean kept."""
    net = copy.deepcopy(net)
    with torch.no_grad():
        for p in (net.wide.weight, net.wide.bias):
            p[gone] = 0
        for p in net.norm.parameters():
            p.view(-1)[gone] = 0
    return net


@pytest.mark.parametrize("name", KINDS)
def test_cut_twice_saved_and_read(name: str, tmp_path: Path) -> None:
    net, x = made(name)
    whole, steps, left = copy.deepcopy(net), [], torch.arange(HIDDEN)
    base = {"kind": "function", "module": HERE, "function": name, "arguments": [], "keywords": {}}
    for seed in range(2):
        graph = find_groups(net, x)
        [group] = graph.groups
        kept = uneven_plan(graph.groups, seed=seed)
        steps.append(cuts_of(graph.groups, kept))
        planned = Sizes(net, graph.groups, x).at({group.name: len(kept[group.name])})
        cut(net, steps[-1])
        assert sum(p.numel() for p in net.parameters()) == planned.parameters
        left = left[torch.tensor(kept[group.name])]
    wanted = absent(whole.double(), sorted(set(range(HIDDEN)) - set(left.tolist())))
    exact = copy.deepcopy(whole)  # scales that are multiplied in float32 are rounded there
    for step in steps:
        cut(exact, step)
    most = TINY if name == "paper" else 1e-13
    with torch.no_grad():
        got, expected = exact(x.double()), wanted(x.double())
        assert float((got - expected).abs().max()) <= most * float(expected.abs().max())
        assert not torch.allclose(expected, whole(x.double()), rtol=1e-3)
    pixels = Preprocessing(channels=3, size=32)
    save_pruned(net, Source(net, base, pixels, pixels, None, None), steps, tmp_path)
    again = load_pruned(tmp_path, trust_remote_code=True)
    with torch.no_grad():
        assert torch.equal(again(x), net(x))


@pytest.mark.parametrize("name", KINDS)
def test_oracle_and_scores_see_the_unit_out_of_the_mean(name: str) -> None:
    net, x = made(name)
    x, y = torch.rand(8, 3, 32, 32), torch.arange(8) % 5
    graph = find_groups(net, x[:2])
    [changes] = loss_changes(net, graph.groups, x, y).values()
    with torch.no_grad():
        without = nn.functional.cross_entropy(absent(net, [3])(x), y, reduction="none")
        dense = nn.functional.cross_entropy(net(x), y, reduction="none")
    assert torch.allclose(changes[:, 3], (without - dense).double(), atol=1e-6)
    found = collect(
        net, graph, x, y, needs={"u_score", "rows", "l1_norm"}, watch=MeasureConfig(directions=8)
    )
    [l1] = [c["l1_norm"] for c in found.constants.values()]
    assert torch.allclose(l1, net.wide.weight.detach().flatten(1).abs().sum(1).double())


@pytest.mark.parametrize("name", KINDS)
def test_the_gradient_foresees_what_the_loss_becomes(name: str) -> None:
    net, _ = made(name)
    torch.manual_seed(1)
    x, y = torch.rand(64, 3, 32, 32), torch.arange(64) % 5
    graph = find_groups(net, x[:2])
    [changes] = loss_changes(net, graph.groups, x, y).values()
    [rows] = taylor(net, graph, x, y, MeasureConfig())[0].values()
    both = torch.stack([-rows.flatten(), changes.flatten()])
    assert float(torch.corrcoef(both)[0, 1]) > 0.85
    slope = float((both[0] * both[1]).sum() / both[0].square().sum())
    assert 0.7 < slope < 1.4  # 0.4 for one of them, were the gate before the norm scored too


def test_what_is_known_of_it() -> None:
    seen = [response_norm(globals()[k]().norm) for k in KINDS]
    assert [(s.scale, s.shift, s.epsilon, s.axis) for s in seen if s] == [
        ("weight", "bias", "eps", -1), ("gamma", "beta", None, -1), ("a", None, "small", -3)
    ]  # fmt: skip
    for other in (Median(), nn.LayerNorm(8), nn.Linear(1, 8), nn.Identity(), nn.Sequential()):
        assert response_norm(other) is None


def test_another_normalisation_stays_whole() -> None:
    torch.manual_seed(0)
    with pytest.raises(ValueError, match="no channels"):
        find_groups(Net(Median(), True), torch.rand(2, 3, 32, 32))


def test_a_cut_that_forgets_the_mean_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    from moe_fair.vision import response_norm as ours

    net, x = made("paper")

    def forgetful(layer: nn.Module, found: ours.ResponseNorm, kept: Tensor) -> None:
        stock(layer, found, kept)
        getattr(layer, found.scale).data.mul_(len(kept) / found.channels)

    stock = ours.cut_response_norm
    monkeypatch.setattr("moe_fair.vision.surgery.cut_response_norm", forgetful)
    with pytest.raises(ValueError, match="differs from the masked one"):
        find_groups(net, x)


def test_cuts_of_other_layers_are_refused() -> None:
    with pytest.raises(ValueError, match="no response normalisation"):
        cut(last(), [("wide", "norm", [0])])
