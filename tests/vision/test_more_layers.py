"""Transposed convolutions, normalisations of single channels and of groups of them."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from moe_fair.vision.checkpoint import load_pruned, save_pruned
from moe_fair.vision.collect import collect, taylor
from moe_fair.vision.graph import Graph
from moe_fair.vision.load import Source
from moe_fair.vision.preprocessing import Preprocessing
from moe_fair.vision.proof import find_groups, uneven_plan
from moe_fair.vision.size import Sizes
from moe_fair.vision.surgery import cut, cuts_of
from moe_fair.vision.unit_outputs import MeasureConfig

HERE = "vision.test_more_layers"


class Net(nn.Module):
    """A normalised convolution, another layer behind it, a convolution and a head."""

    def __init__(self, norm: nn.Module, second: nn.Module) -> None:
        super().__init__()
        self.a, self.norm = nn.Conv2d(3, 16, 3, padding=1, stride=2), norm
        self.b, self.c, self.head = second, nn.Conv2d(12, 6, 3), nn.Linear(6, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.b(self.norm(self.a(x)).sinh()).sinh()  # both signs, and 0 at 0
        return self.head(self.c(x).relu().mean((2, 3)))


def up() -> nn.Module:
    return Net(nn.Identity(), nn.ConvTranspose2d(16, 12, 2, stride=2))


def sync() -> nn.Module:
    return Net(nn.SyncBatchNorm(16), nn.Conv2d(16, 12, 3))


def instance() -> nn.Module:
    return Net(nn.InstanceNorm2d(16, affine=True), nn.Conv2d(16, 12, 3))


def plain_instance() -> nn.Module:
    return Net(nn.InstanceNorm2d(16), nn.Conv2d(16, 12, 3))


def grouped() -> nn.Module:
    return Net(nn.GroupNorm(4, 16), nn.Conv2d(16, 12, 3))


def slopes() -> nn.Module:
    """A slope for every channel; then one for all."""
    return Net(nn.PReLU(16), nn.Sequential(nn.PReLU(), nn.Conv2d(16, 12, 3), nn.PReLU(12)))


UNITS = {"slopes": [16, 12, 6], "up": [16, 12, 6], "sync": [16, 12, 6], "instance": [16, 12, 6],
         "plain_instance": [16, 12, 6], "grouped": [4, 12, 6]}  # fmt: skip


def made(name: str) -> tuple[nn.Module, Graph, Tensor]:
    torch.manual_seed(0)
    net, x = globals()[name]().eval(), torch.rand(2, 3, 16, 16)
    return net, find_groups(net, x), x


@pytest.mark.parametrize("name", UNITS)
def test_the_cut_net_is_the_one_whose_channels_are_silenced(name: str, tmp_path: Path) -> None:
    net, graph, x = made(name)
    assert [g.units.size for g in graph.groups] == UNITS[name]
    kept = uneven_plan(graph.groups, seed=3)
    silenced = copy.deepcopy(net).double()
    together = 16 // graph.groups[0].units.size
    first = "b.1" if name == "slopes" else "b"
    readers = zip((together, 1, 1), (first, "c", "head"), graph.groups, strict=True)
    with torch.no_grad():
        for width, reader, group in readers:
            gone = sorted(set(range(group.units.size)) - set(kept[group.name]))
            channels = [u * width + k for u in gone for k in range(width)]
            weight = silenced.get_submodule(reader).weight  # [out, in], or [in, out] on its head
            (weight if name == "up" and reader == "b" else weight.transpose(0, 1))[channels] = 0  # type: ignore[index, operator, union-attr]
    small, cuts = copy.deepcopy(net), cuts_of(graph.groups, kept)
    sizes = Sizes(net, graph.groups, x)
    cut(small, cuts)
    with torch.no_grad():
        want, found = silenced(x.double()), copy.deepcopy(small).double()(x.double())
    assert (want - found).abs().max() <= 1e-12 * want.abs().max()
    predicted = sizes.at({n: len(ids) for n, ids in kept.items()})
    assert predicted.parameters == sum(p.numel() for p in small.parameters())
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        small(x[:1])
    assert 2 * predicted.operations == counter.get_total_flops()
    base = {"kind": "function", "module": HERE, "function": name, "arguments": [],
            "keywords": {}}  # fmt: skip
    pixels = Preprocessing(3, 16)
    save_pruned(small, Source(small, base, pixels, pixels, None, None), [cuts], tmp_path)
    again = load_pruned(tmp_path, trust_remote_code=True)
    with torch.no_grad():
        assert torch.equal(again(x), small(x))
    if name == "slopes":
        assert again.norm.num_parameters == len(again.norm.weight) < 16  # type: ignore[arg-type, union-attr]
        return
    # a layer's numbers are those of its weights: exporters and others read them
    dims = list(again.b.weight.shape[:2])  # type: ignore[union-attr, index]
    named = [again.b.out_channels, again.b.in_channels]  # type: ignore[union-attr]
    assert dims == (named[::-1] if name == "up" else named)
    if name == "grouped":
        assert again.norm.num_channels == 4 * again.norm.num_groups == dims[1]  # type: ignore[union-attr, operator]


def test_scores_of_a_transposed_convolutions_filters() -> None:
    net, graph, x = made("up")
    labels = torch.tensor([0, 3])
    found = collect(net, graph, x, labels, needs={"l1_norm", "l2_norm"})
    weight = net.b.weight.detach().double()  # type: ignore[union-attr, operator]
    for i in range(12):
        assert found.constants["b"]["l1_norm"][i] == pytest.approx(float(weight[:, i].abs().sum()))
        assert found.constants["b"]["l2_norm"][i] == pytest.approx(float(weight[:, i].norm()))
    _, sums = taylor(net, graph, x, labels, MeasureConfig(2), weights=True)
    nn.functional.cross_entropy(net(x), labels).backward()
    product = (net.b.weight * net.b.weight.grad).detach()  # type: ignore[union-attr, operator]
    for i in range(12):
        assert float(sums["b"][i]) == pytest.approx(float(product[:, i].sum()), rel=1e-4, abs=1e-9)


def test_normalised_together_with_all_stays_whole() -> None:
    torch.manual_seed(0)
    net = Net(nn.GroupNorm(1, 16), nn.Conv2d(16, 12, 3)).eval()
    graph = find_groups(net, torch.rand(2, 3, 16, 16))
    assert "a" not in [g.name for g in graph.groups]
    assert "groups of 16 that GroupNorm normalises together" in graph.whole["a"]


def test_half_of_what_is_normalised_together_cannot_be_cut() -> None:
    net = grouped()
    with pytest.raises(ValueError, match="a part of what it normalises together"):
        cut(net, [("norm", "out", [0, 1])])
