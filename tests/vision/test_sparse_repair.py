"""Variance matching: the dense mean and variance of every channel come back, and nothing else."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn
from vision.architectures import images, lively

from moe_fair.vision.graph import BATCH_NORMS, logits
from moe_fair.vision.sparse.layers import Net, find_layers, keep_largest
from moe_fair.vision.sparse.repair import match_variance, moments
from moe_fair.vision.sparse.rules import rule


def conv_bias() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 8, 3, groups=2), nn.ReLU(inplace=True),
        nn.Conv2d(8, 12, 3, stride=2), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(),
        nn.Linear(12, 5),
    )  # fmt: skip


def linear() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Flatten(), nn.Linear(3072, 24), nn.ReLU(), nn.Linear(24, 16), nn.GELU(),
        nn.Linear(16, 5),
    )  # fmt: skip


NETS = {
    "conv and batch norm": lambda: lively("vgg16_bn"),
    "residual": lambda: lively("resnet20"),
    "conv and bias": conv_bias,
    "linear": linear,
    "transformer": lambda: lively("vit"),
}


def prune(model: nn.Module, x: Tensor, sparsity: float = 0.7) -> tuple[nn.Module, Net]:
    net = Net(model.eval(), find_layers(model, x[:2])[0], x)
    pruned = copy.deepcopy(model)
    total = sum(y.size for y in net.layers)
    keep_largest(pruned, rule("erk").allocate(net, total - round(sparsity * total)).kept)
    return pruned, net


def seen(model: nn.Module, x: Tensor) -> dict[str, tuple[Tensor, Tensor]]:
    """Mean and variance per channel, where the repair should show: of a batch normalisation's
    output where one reads the layer, else of the layer's. A plain forward, nothing of ours."""
    outputs: dict[str, Tensor] = {}
    kinds = (nn.Linear, nn.Conv2d, *BATCH_NORMS)
    handles = [
        m.register_forward_hook(lambda _, __, out, n=n: outputs.__setitem__(n, out.clone()))
        for n, m in model.named_modules()
        if isinstance(m, kinds)
    ]
    with torch.no_grad():
        logits(model, x)
    for h in handles:
        h.remove()
    found = {}
    for n, out in outputs.items():
        m = model.get_submodule(n)
        if isinstance(m, nn.Conv2d) and m.bias is None:
            continue  # its batch normalisation is there too
        axis = out.dim() - 1 if isinstance(m, nn.Linear) else 1
        rows = out.double().transpose(0, axis).flatten(1)
        found[n] = rows.mean(1), rows.var(1, correction=0)
    return found


@pytest.mark.parametrize("name", NETS)
def test_the_dense_mean_and_variance_come_back(name: str) -> None:
    x = images(48)
    model = NETS[name]()
    pruned, net = prune(model, x)
    wanted, cut = seen(model, x), seen(pruned, x)
    places = match_variance(pruned, moments(model, net.layers, x), net.layers, x, shrinkage=0.0)
    got = seen(pruned, x)
    assert len(wanted) >= 3
    assert "nowhere" not in places.values()
    worst = before = 0.0
    for n, (mean, variance) in wanted.items():
        scale = variance.sqrt().clamp(min=1e-6)
        worst = max(worst, float(((got[n][0] - mean) / scale).abs().max()))
        worst = max(worst, float((got[n][1] / variance.clamp(min=1e-12) - 1).abs().max()))
        before = max(before, float((cut[n][1] / variance.clamp(min=1e-12) - 1).abs().max()))
    assert worst < 1e-5
    assert before > 0.1  # pruning had changed them


@pytest.mark.parametrize("name", NETS)
def test_nothing_is_added_and_zeros_stay(name: str) -> None:
    x = images(16)
    model = NETS[name]()
    pruned, net = prune(model, x)
    repaired = copy.deepcopy(pruned)
    match_variance(repaired, moments(model, net.layers, x), net.layers, x)
    before, after = pruned.state_dict(), repaired.state_dict()
    assert {n: t.shape for n, t in before.items()} == {n: t.shape for n, t in after.items()}
    changed = {n for n in before if not torch.equal(before[n], after[n])}
    for y in net.layers:
        w, v = before[f"{y.name}.weight"], after[f"{y.name}.weight"]
        assert torch.equal(w == 0, v == 0)
        # one factor for a channel
        rows = (v / w.where(w != 0, torch.nan)).flatten(1)
        spread = rows.nan_to_num(-1e9).amax(1) / rows.nan_to_num(1e9).amin(1)
        assert torch.allclose(spread[(w != 0).flatten(1).any(1)], torch.tensor(1.0), atol=1e-4)
    ends = tuple(f"{y.name}.{k}" for y in net.layers for k in ("weight", "bias"))
    assert changed
    assert all(n in ends or n.endswith("running_mean") for n in changed)


def test_shrinkage_holds_weak_channels_back() -> None:
    layer = nn.Linear(3, 2)
    with torch.no_grad():
        layer.weight.copy_(torch.tensor([[4.0, 0.1, 0.0], [2.0, 1.0, 1.5]]))
        layer.bias.copy_(torch.tensor([0.3, -0.2]))
    model = nn.Sequential(layer).eval()
    x = torch.randn(200, 3, generator=torch.Generator().manual_seed(0)) * torch.tensor(
        [1.0, 1.0, 2.0]
    )
    layers, _ = find_layers(model, x)
    pruned = copy.deepcopy(model)
    with torch.no_grad():
        pruned[0].weight[0, 0] = 0  # all but a fortieth of the signal
        pruned[0].weight[1, 1] = 0
    y, z = (m(x).detach().double() for m in (model, pruned))
    shrinkage = 0.01
    match_variance(pruned, moments(model, layers, x), layers, x, shrinkage=shrinkage)
    got = pruned(x).detach().double()
    for c, weak in ((0, True), (1, False)):
        s, t = y[:, c].std(correction=0), z[:, c].std(correction=0)
        v = float(t**2 / s**2)
        scale = 1 + v / (v + shrinkage) * (float(s / t) - 1)
        assert float(got[:, c].std(correction=0)) == pytest.approx(scale * float(t), rel=1e-5)
        assert float(got[:, c].mean()) == pytest.approx(float(y[:, c].mean()), abs=1e-5)
        assert (float(got[:, c].std(correction=0) / s) < 0.1) is weak


def test_a_channel_that_is_dead_gets_its_mean() -> None:
    model = conv_bias().eval()
    x = images(8)
    layers, _ = find_layers(model, x)
    dense = moments(model, layers, x)
    pruned = copy.deepcopy(model)
    with torch.no_grad():
        pruned[0].weight[2] = 0
    match_variance(pruned, dense, layers, x, shrinkage=0.0)
    with torch.no_grad():
        out = pruned[0](x)[:, 2]
    assert not pruned[0].weight[2].any()
    assert torch.allclose(out, dense["0"].mean[2].float().expand_as(out), atol=1e-6)


class Bare(nn.Module):
    """Two convolutions without a bias that no batch normalisation reads directly."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Conv2d(3, 4, 3, bias=False), nn.Conv2d(4, 4, 3, bias=False)
        self.norm, self.head = nn.BatchNorm2d(4), nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.b(torch.relu(self.a(x))))
        return self.head(self.norm(x).mean((2, 3)))


def test_a_shift_without_a_place_is_said() -> None:
    torch.manual_seed(0)
    model, x = Bare().eval(), images(16)
    pruned, net = prune(model, x, 0.5)
    dense = moments(model, net.layers, x)
    places = match_variance(pruned, dense, net.layers, x, shrinkage=0.0)
    assert places == {"a": "nowhere", "b": "nowhere", "head": "bias"}
    assert torch.equal(pruned.norm.running_mean, model.norm.running_mean)
    with torch.no_grad():
        rows = pruned.a(x).double().transpose(0, 1).flatten(1)
    torch.testing.assert_close(rows.var(1, correction=0), dense["a"].variance, rtol=1e-5, atol=0)
