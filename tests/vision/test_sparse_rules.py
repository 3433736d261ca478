"""Where the zeros go: every rule against its definition, and every total met exactly."""

from __future__ import annotations

import copy
from itertools import pairwise

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from vision.architectures import images, lively

from moe_fair.vision import zoo
from moe_fair.vision.graph import logits
from moe_fair.vision.sparse.fill import check_total, shares
from moe_fair.vision.sparse.layers import Layer, Net, find_layers, keep_largest, largest, zeros
from moe_fair.vision.sparse.rules import rule, rules
from moe_fair.vision.sparse.rules.lamp import score
from moe_fair.vision.sparse.rules.rr import LEAST, repairability
from moe_fair.vision.sparse.rules.tod import taylor

PUBLISHED = {"uniform", "erk", "lamp", "global", "tod", "rr"}


def net_of(model: nn.Module, x: Tensor) -> Net:
    return Net(model.eval(), find_layers(model, x)[0], x, batch_size=3)


def chain(*weights: list[list[float]]) -> nn.Sequential:
    """Linear layers with these weights."""
    made = nn.Sequential()
    for w in weights:
        layer = nn.Linear(len(w[0]), len(w), bias=False)
        layer.weight.data = torch.tensor(w)
        made.append(layer)
    return made


def kept(name: str, net: Net, keep: int) -> list[int]:
    budget = rule(name).allocate(net, keep)
    return [budget.kept[x.name] for x in net.layers]


def test_there_are_the_published_rules() -> None:
    assert set(rules()) >= PUBLISHED | {"rr-erk"}


@pytest.mark.parametrize(
    ("keep", "hand"),
    [
        # 1 → 2 and 2 → 4 channels of 3 × 3, 4 → 3: sums of dimensions 9, 12, 7; sizes 18, 72, 12
        (14, [5, 6, 3]),  # c = 1/2: 4.5, 6, 3.5
        (28, [9, 12, 7]),  # c = 1
        (51, [17, 22, 12]),  # c = 51/28 gives the last 12.75 > 12; then c = 39/21: 16.7, 22.3
        (90, [18, 60, 12]),  # two are full
    ],
)
def test_erk_by_hand(keep: int, hand: list[int]) -> None:
    model = nn.Sequential(
        nn.Conv2d(1, 2, 3), nn.Conv2d(2, 4, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten(),
        nn.Linear(4, 3),
    )  # fmt: skip
    net = net_of(model, images(2, channels=1))
    assert [x.size for x in net.layers] == [18, 72, 12]
    assert kept("erk", net, keep) == hand


def test_lamp_by_hand() -> None:
    model = chain([[3.0, -2.0, 1.0]], [[10.0], [0.1]], [[1.0, -1.0], [2.0, 0.5]])
    net = net_of(model, torch.randn(2, 3))
    assert torch.allclose(score(model[0].weight), torch.tensor([[1, 4 / 13, 1 / 14]]).double())
    found = score(model[2].weight)
    assert torch.allclose(found, torch.tensor([[1 / 6, 1 / 6], [1, 0.25 / 6.25]]).double())
    # all scores: 1 1 1, .308 (first), .167 .167 (third), .071 (first), .04 (third), .0001
    hands = {3: [1, 1, 1], 4: [2, 1, 1], 5: [2, 1, 2], 6: [2, 1, 3], 7: [3, 1, 3], 8: [3, 1, 4]}
    assert {k: kept("lamp", net, k) for k in hands} == hands
    # the largest weights of the model: 10, then 3, then 2 and 2, 1 ×3, .5, .1; one a layer at least
    hands = {3: [1, 1, 1], 4: [2, 1, 1], 5: [3, 1, 1], 7: [3, 1, 3], 8: [3, 1, 4]}
    assert {k: kept("global", net, k) for k in hands} == hands


def test_lamp_is_its_definition() -> None:
    w = torch.randn(5, 3, 3, 3, generator=torch.Generator().manual_seed(0))
    w[0, 0] = w[1, 1] = 0.5  # equal magnitudes
    w[2, 2] = 0.0
    flat = w.double().flatten().tolist()
    direct = [v * v / sum(u * u for u in flat if abs(u) >= abs(v)) for v in flat]
    np.testing.assert_allclose(score(w).flatten().numpy(), direct, rtol=1e-12)
    assert not score(torch.zeros(4)).any()


@settings(max_examples=30, deadline=None)
@given(
    widths=st.lists(st.integers(1, 9), min_size=2, max_size=6),
    part=st.floats(0, 1),
    gone=st.floats(0, 0.6),
    seed=st.integers(0, 5),
)
def test_every_rule_meets_the_total(widths: list[int], part: float, gone: float, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    model = nn.Sequential()
    for a, b in pairwise(widths):
        model.extend([nn.Linear(a, b), nn.ReLU()])
    with torch.no_grad():
        for p in model.parameters():
            values = torch.randn(p.shape, generator=generator)
            p.copy_(values.masked_fill(torch.rand(p.shape, generator=generator) < gone, 0))
    net = net_of(model, torch.randn(7, widths[0], generator=generator))
    least = sum(min(1, x.present) for x in net.layers)
    most = sum(x.present for x in net.layers)
    keep = least + round(part * (most - least))
    before = {n: p.clone() for n, p in model.state_dict().items()}
    for made in rules().values():
        budget = made.allocate(net, keep)
        assert sum(budget.kept.values()) == keep, made.name
        assert all(min(1, x.present) <= budget.kept[x.name] <= x.present for x in net.layers)
        assert all(torch.equal(before[n], p) for n, p in model.state_dict().items())
        pruned = copy.deepcopy(model)
        keep_largest(pruned, budget.kept)
        assert sum(zeros(pruned, net.layers).values()) == sum(x.size for x in net.layers) - keep


@pytest.mark.parametrize("name", sorted(PUBLISHED | {"rr-erk"}))
def test_totals_on_a_residual_net(name: str) -> None:
    net = net_of(lively("resnet20"), images(6))
    total = sum(x.size for x in net.layers)
    for sparsity in (0.0, 0.5, 0.8, 0.95, 0.99):
        keep = total - round(sparsity * total)
        assert sum(kept(name, net, keep)) == keep
    # another order of the images changes nothing that is counted
    again = Net(net.model, net.layers, net.images.flip(0), batch_size=2)
    other = kept(name, again, total // 10)
    assert np.abs(np.subtract(other, kept(name, net, total // 10))).max() <= 1


def test_uniform_is_even_and_tod_follows_its_channels() -> None:
    net = net_of(lively("resnet20"), images(6))
    total = sum(x.size for x in net.layers)
    for x, k in zip(net.layers, kept("uniform", net, total // 20), strict=True):
        assert abs(k - x.size / 20) <= 1
    # both rankings agree in the second layer and are opposed in the first: the second gives more
    rows = [[float(i + 1)] * 8 for i in range(8)]
    model = chain(rows, rows)
    two = net_of(model, torch.randn(6, 8, generator=torch.Generator().manual_seed(0)))
    rising = torch.arange(8.0).double()
    two.known["tod"] = {"0": -rising, "1": rising}
    first, second = kept("tod", two, 96)
    assert (first, second) == (64, 32)  # 4 of 8 rows of the second layer, none of the first


def test_tod_protects_by_the_gradient_of_the_named_class() -> None:
    model = lively("resnet20")
    net = net_of(model, images(4))
    name = net.layers[3].name
    weight = model.get_parameter(f"{name}.weight")
    out = logits(model, net.images)
    loss = nn.functional.cross_entropy(out, out.detach().argmax(-1), reduction="sum")
    [gradient] = torch.autograd.grad(loss, [weight])
    wanted = (weight * gradient).flatten(1).sum(1).abs()
    torch.testing.assert_close(taylor(net)[name].float(), wanted.detach(), rtol=1e-3, atol=1e-4)
    assert all(p.requires_grad for p in model.parameters())


def naive_repairability(y: np.ndarray, z: np.ndarray) -> tuple[float, float]:
    """D_raw and D_res, channel by channel; y, z [S, C, ...] or [S, C]."""
    raw = residual = size = 0.0
    for c in range(y.shape[1]):
        a, b = y[:, c].ravel(), z[:, c].ravel()
        repaired = a.mean() + (b - b.mean()) * (a.std() / b.std() if b.std() > 1e-9 else 0)
        raw += ((a - b) ** 2).sum()
        residual += ((a - repaired) ** 2).sum()
        size += (a**2).sum()
    return raw / size, residual / size


def test_rr_is_its_definition() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(3, 6, 3, bias=False), nn.BatchNorm2d(6), nn.ReLU(),
        nn.Conv2d(6, 5, 3, stride=2), nn.ReLU(), nn.AdaptiveAvgPool2d(2), nn.Flatten(),
        nn.Linear(20, 4),
    ).eval().double()  # fmt: skip
    x = images(8).double()
    found = repairability(net_of(model, x), 0.3)
    at = x
    for i, layer in enumerate(model):
        with torch.no_grad():
            out = layer(at)
        if isinstance(layer, (nn.Conv2d, nn.Linear)):
            w = layer.weight.detach().numpy()
            border = np.sort(np.abs(w).ravel())[::-1][round(0.3 * w.size) - 1]
            cut = copy.deepcopy(layer)
            cut.weight.data = torch.from_numpy(np.where(np.abs(w) >= border, w, 0.0))
            with torch.no_grad():
                raw, residual = naive_repairability(out.numpy(), cut(at).numpy())
            mine = found[str(i)]
            assert mine["raw"] == pytest.approx(raw, rel=1e-9)
            assert mine["residual"] == pytest.approx(residual, rel=1e-9)
            assert mine["rr"] == pytest.approx(residual / raw, rel=1e-9)
            assert 0 < mine["rr"] < 2
        at = out


def test_rr_gives_more_to_layers_that_are_repaired_better() -> None:
    net = net_of(lively("resnet20"), images(6))
    total = sum(x.size for x in net.layers)
    density = (total // 10) / total
    found = repairability(net, density)
    budget = rule("rr").allocate(net, total // 10)
    assert budget.explanation["layers"] == found
    order = sorted(net.layers, key=lambda x: found[x.name]["rr"])
    shares_ = [budget.kept[x.name] / x.size for x in order if x.size > 2000]
    assert shares_ == sorted(shares_)
    assert shares_[0] < shares_[-1]
    # the limit: none below a quarter of the global density
    for x in net.layers:
        assert budget.kept[x.name] >= int(LEAST * density * x.size)
    low = {x.name: {"raw": 1.0, "residual": 0.0, "rr": 0.0} for x in net.layers}
    low[net.layers[0].name]["rr"] = 1.0
    other = Net(net.model, net.layers, net.images, known={("rr", density): low})
    held = rule("rr").allocate(other, total // 10).kept
    first, *rest = net.layers
    assert held[first.name] == first.size  # takes what it can; the others share the rest evenly
    shares_ = [held[x.name] / x.size for x in rest if x.size > 2000]
    assert max(shares_) - min(shares_) < 1e-3


def test_the_smallest_weights_leave_and_equal_ones_by_place() -> None:
    w = torch.tensor([[0.5, -2.0, 0.5], [0.0, 0.5, 1.0]])
    assert largest(w, 0).sum() == 0
    assert largest(w, 3).tolist() == [[True, True, False], [False, False, True]]
    assert largest(w, 4).tolist() == [[True, True, True], [False, False, True]]
    model = chain(w.tolist())
    keep_largest(model, {"0": 3})
    assert model[0].weight.tolist() == [[0.5, -2.0, 0.0], [0.0, 0.0, 1.0]]
    assert not torch.signbit(model[0].weight[model[0].weight == 0]).any()


def test_what_a_limit_holds_back_goes_to_the_others() -> None:
    layers = [Layer(n, (size,), size) for n, size in (("a", 10), ("b", 100), ("c", 100))]
    assert shares(layers, {"a": 50, "b": 30, "c": 20}, 60) == {"a": 10, "b": 30, "c": 20}
    full = shares(layers, {"a": 0, "b": 1, "c": 0}, 120)
    assert full["b"] == 100
    assert full["a"] + full["c"] == 20
    assert shares(layers, dict.fromkeys("abc", 0), 21) == {"a": 1, "b": 10, "c": 10}


def test_totals_that_cannot_be() -> None:
    layers = [Layer("a", (4, 5), 10), Layer("b", (4, 5), 20)]
    check_total(layers, 2)
    check_total(layers, 30)
    with pytest.raises(ValueError, match=r"leaves 1 weights for 2 layers.* highest is 0\.95"):
        check_total(layers, 1)
    with pytest.raises(ValueError, match=r"sparser already: 25\.0000% of its weights are zero"):
        check_total(layers, 31)


class Odd(nn.Module):
    """A layer that runs twice, two that share a weight, one that never runs, and one made anew."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.twice, self.idle = nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 4)
        self.a, self.b = nn.Linear(4, 4), nn.Linear(4, 4)
        self.b.weight = self.a.weight
        self.made = nn.utils.parametrizations.weight_norm(nn.Linear(4, 4))

    def forward(self, x: Tensor) -> Tensor:
        return self.made(self.b(self.a(self.twice(self.twice(self.first(x))))))


def test_layers_that_stay_dense_say_why() -> None:
    layers, dense = find_layers(Odd().eval(), torch.randn(2, 4))
    assert [x.name for x in layers] == ["first"]
    assert dense == {
        "twice": "runs 2 times in a forward",
        "idle": "does not run as a layer of its own",
        "a": "shares its weight with another layer",
        "b": "shares its weight with another layer",
        "made": "its weight is computed from others",
    }
    with pytest.raises(ValueError, match="no convolution or linear layer"):
        find_layers(nn.Sequential(nn.ReLU(), nn.BatchNorm1d(4)).eval(), torch.randn(2, 4))
    broken = zoo.resnet20(width=4).eval()
    broken.conv1.weight.data[0, 0, 0, 0] = torch.nan
    with pytest.raises(ValueError, match=r"conv1\.weight holds values that are not finite"):
        find_layers(broken, images(2))
