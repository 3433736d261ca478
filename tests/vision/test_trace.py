"""One operation that cannot be followed leaves its group whole, never the run."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch
from torch import Tensor, nn
from vision.architectures import images

from moe_fair.vision import trace
from moe_fair.vision.graph import CHOSEN, logits
from moe_fair.vision.proof import find_groups


class Net(nn.Module):
    """Two convolutions before `between`, and one pair behind it that can always be cut."""

    def __init__(self, width: int = 8) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.a, self.b = nn.Conv2d(3, 8, 3), nn.Conv2d(8, 8, 3)
        self.c, self.d = nn.Conv2d(width, 6, 3), nn.Conv2d(6, 6, 3)
        self.head = nn.Linear(6, 4)

    def between(self, x: Tensor) -> Tensor:
        return x

    def forward(self, x: Tensor) -> Tensor:
        x = self.between(self.b(self.a(x).relu()))
        return self.head(self.d(self.c(x).relu()).relu().mean((2, 3)))


class Shuffle(Net):
    """Halves that are interleaved, as ShuffleNet's; one of them untouched."""

    def between(self, x: Tensor) -> Tensor:
        one, two = x.chunk(2, 1)
        x = torch.cat([one, two.relu()], 1)
        s, c, h, w = x.shape
        return x.view(s, 2, c // 2, h, w).transpose(1, 2).reshape(s, c, h, w)


class PixelShuffle(Net):
    def __init__(self) -> None:
        super().__init__(width=2)

    def between(self, x: Tensor) -> Tensor:
        return nn.functional.pixel_shuffle(x, 2)


class Gated(Net):
    def __init__(self) -> None:
        super().__init__(width=4)

    def between(self, x: Tensor) -> Tensor:
        return nn.functional.glu(x, 1)


class NonLocal(Net):
    """Positions that attend to one another by their channels, stacked."""

    def between(self, x: Tensor) -> Tensor:
        for _ in range(6):
            flat = x.flatten(2)
            weights = (flat.transpose(1, 2) @ flat).softmax(-1)
            x = x + (flat @ weights).view_as(x)
        return x


class Sums(Net):
    """So many paths that they cannot be walked one by one."""

    def between(self, x: Tensor) -> Tensor:
        for _ in range(24):
            x = torch.cat([x.sin() + x.cos(), x.tanh() + x], 1).unflatten(1, (2, 8)).sum(1)
        return x


class Siamese(Net):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) - super().forward(x.flip(3))


@pytest.mark.parametrize("net", [Shuffle, PixelShuffle, Gated, NonLocal, Sums, Siamese])
def test_the_others_are_cut(net: type[Net]) -> None:
    graph = find_groups(net().eval(), images(2))
    assert {"c", "d"} <= {g.name for g in graph.groups}
    assert "head" in graph.whole
    for layer in ("a", "b"):
        assert layer in graph.whole or layer in {g.name for g in graph.groups}


def test_what_fails_in_the_trace_is_the_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(trace, "MOST_STEPS", 1)
    graph = find_groups(Net().eval(), images(2))
    assert [g.name for g in graph.groups] == ["b"]
    assert graph.whole["a"].startswith("its channels cannot be followed: TooLongError")


class Flat(Net):
    """Every channel of the last layer is 64 inputs of the head."""

    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Linear(6 * 64, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.c(self.b(self.a(x).relu()).relu()).relu()
        x = nn.functional.adaptive_avg_pool2d(self.d(x).relu(), 8)
        return self.head(x.flatten(1))


def test_what_multiplies_channels_has_a_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    """Torchvision's Swin came to 19 GB of places before the machine ended the process."""
    graph = find_groups(Flat().eval(), images(2, 16))
    assert {g.name for g in graph.groups} == {"a", "b", "c", "d"}
    monkeypatch.setattr(trace, "MOST_PLACES", 6 * 64 - 1)
    graph = find_groups(Flat().eval(), images(2, 16))
    assert {g.name for g in graph.groups} == {"a", "b", "c"}
    assert "TooLongError: too many paths" in graph.whole["d"]


class Raises(Net):
    def between(self, x: Tensor) -> Tensor:
        raise KeyError("of the model's own")


def test_a_model_that_does_not_run_is_refused_in_a_line() -> None:
    with pytest.raises(ValueError, match=r"the model cannot be traced: KeyError: .of the model's"):
        find_groups(Raises().eval(), images(2))


class SpectralNorm(Net):
    def __init__(self) -> None:
        super().__init__()
        self.b = nn.utils.parametrizations.spectral_norm(self.b)


class WeightNorm(Net):
    def __init__(self) -> None:
        super().__init__()
        self.b = nn.utils.parametrizations.weight_norm(self.b)


@pytest.mark.parametrize("net", [SpectralNorm, WeightNorm])
def test_layers_whose_weights_are_computed_stay_whole(net: type[Net]) -> None:
    graph = find_groups(net().eval(), images(2))
    assert [g.name for g in graph.groups] == ["c", "d"]
    assert {"a", "b"} <= set(graph.whole)


class Kept(Net):
    """As timm's LeViT and EfficientFormer: what evaluation computes once is kept until training."""

    def __init__(self, holder: type) -> None:
        super().__init__()
        self.bias, self.holder, self.kept = nn.Parameter(torch.randn(1)), holder, holder()

    def between(self, x: Tensor) -> Tensor:
        if not self.kept:
            bias = self.bias * 2
            self.kept = {"cpu": bias} if self.holder is dict else self.holder([bias])
        return x + (self.kept["cpu"] if self.holder is dict else self.kept[0])

    def train(self, mode: bool = True) -> Kept:
        self.kept = self.holder() if mode else self.kept
        return super().train(mode)


@pytest.mark.parametrize("holder", [dict, list, tuple])
def test_what_a_module_keeps_of_its_last_call(holder: type) -> None:
    net = Kept(holder).eval()
    net(images(2))  # as its owner may have run it, with gradients
    assert [g.name for g in find_groups(net, images(2)).groups] == ["a", "b", "c", "d"]


class Tuple(Net):
    def forward(self, x: Tensor) -> tuple:  # type: ignore[override]
        return (super().forward(x),)


class Dict(Net):
    def forward(self, x: Tensor) -> dict:  # type: ignore[override]
        return {"features": x, "logits": super().forward(x)}


@pytest.mark.parametrize("net", [Tuple, Dict])
def test_outputs_in_a_container(net: type[Net]) -> None:
    assert [g.name for g in find_groups(net().eval(), images(2)).groups] == ["a", "b", "c", "d"]


class Several(Net):
    def forward(self, x: Tensor) -> tuple:  # type: ignore[override]
        return super().forward(x), super().forward(x)


def test_outputs_among_which_none_is_named_are_refused() -> None:
    with pytest.raises(ValueError, match=r"a tuple of 2 things \(0, 1\), .*: say which .*--logits"):
        find_groups(Several().eval(), images(2))


def test_a_name_or_number_says_where_the_logits_are() -> None:
    @dataclass
    class Parts:
        features: Tensor
        scores: Tensor

    class Named(Net):
        def forward(self, x: Tensor) -> Parts:  # type: ignore[override]
            return Parts(x, super().forward(x))

    for net, name in ((Several(), "1"), (Dict(), "logits"), (Named(), "scores")):
        setattr(net, CHOSEN, name)
        assert [g.name for g in find_groups(net.eval(), images(2)).groups] == ["a", "b", "c", "d"]
    for net, name, said in (
        (Several(), "2", "the model gives 0, 1; name what is a tensor"),
        (Named(), "score", "the model gives features, scores; name"),
        (Net(), "0", "the model gives a Tensor without parts"),
    ):
        setattr(net, CHOSEN, name)
        with pytest.raises(ValueError, match=f"--logits {name}: {said}"):
            logits(net.eval(), images(2))
