"""The proof says nothing it has not seen: what hides a wrong cut does not hide it from the proof.

Every net here divides a stream by what all of its channels together are (`across`), so that a cut
is wrong, and has something beside it that makes two outputs equal whatever is cut.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from vision.architectures import images, lively

from moe_fair.vision import proof
from moe_fair.vision.proof import find_groups
from moe_fair.vision.surgery import Cut, cut, cuts_of
from moe_fair.vision.trace import copied
from moe_fair.vision.trial import Trial

DIFFERS = "the cut model differs from the masked one"


def across(x: Tensor) -> Tensor:
    return x / (1 + x.square().sum(1, keepdim=True)).sqrt()


class Net(nn.Module):
    """Two convolutions that can be cut, with `across` between the second and the next."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.a, self.b, self.c = nn.Conv2d(3, 8, 3), nn.Conv2d(8, 8, 3), nn.Conv2d(8, 8, 3)
        self.head = nn.Linear(8, 4)

    def wrong(self, x: Tensor) -> Tensor:
        return across(x)

    def out(self, x: Tensor) -> Tensor:
        return self.head(self.c(x).mean((2, 3)))

    def forward(self, x: Tensor) -> Any:
        return self.out(self.wrong(self.b(self.a(x).relu())))


class ZeroHead(Net):
    def __init__(self) -> None:
        super().__init__()
        nn.init.zeros_(self.head.weight)


class LayerScale(Net):
    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(8)  # of parameters that are not called a scale
        nn.init.constant_(self.norm.weight, 1e-9)

    def out(self, x: Tensor) -> Tensor:
        x = self.norm(self.c(x).movedim(1, -1)).mean((1, 2))
        return self.head(x)


class Saturated(Net):
    def out(self, x: Tensor) -> Tensor:
        return (1e9 * super().out(x)).softmax(-1)


class OfImages(Net):
    """On noise everything is as it should be."""

    def forward(self, x: Tensor) -> Any:
        y = self.b(self.a(x).relu())
        return self.out(across(y) if x.min() >= 0 else y)


class OfSizes(Net):
    def forward(self, x: Tensor) -> Any:
        y = self.b(self.a(x).relu())
        return self.out(y if x.shape[-1] == 32 else across(y))


class Training(Net):
    def wrong(self, x: Tensor) -> Tensor:
        return across(x) if self.training else x


class Precise(Net):
    """Works in float32 alone."""

    def forward(self, x: Tensor) -> Any:
        return super().forward(x.float())


@pytest.mark.parametrize(
    "net", [Net, ZeroHead, LayerScale, Saturated, OfImages, OfSizes, Training, Precise]
)
def test_nothing_hides_a_wrong_cut(net: type[Net]) -> None:
    graph = find_groups(net().eval(), images(2))
    assert DIFFERS in graph.whole["b"]
    assert "a" in [g.name for g in graph.groups]
    assert "b" not in [g.name for g in graph.groups]


def test_the_images_of_the_run_are_looked_at() -> None:
    class Bright(OfImages):
        def forward(self, x: Tensor) -> Any:
            return super().forward(x - 2)

    assert "b" not in find_groups(Bright().eval(), images(2)).whole
    real = 3 + torch.rand(2, 3, 32, 32)
    assert DIFFERS in find_groups(Bright().eval(), images(2), real=real).whole["b"]


class NotFinite(Net):
    def out(self, x: Tensor) -> Tensor:
        return super().out(x) + torch.nan


def test_outputs_that_are_not_finite_prove_nothing() -> None:
    with pytest.raises(ValueError, match="b: the model's outputs are not finite"):
        find_groups(NotFinite().eval(), images(2))


class WithoutEffect(Net):
    def wrong(self, x: Tensor) -> Tensor:
        return 0 * across(x)


def test_groups_without_an_effect_stay_whole() -> None:
    graph = find_groups(WithoutEffect().eval(), images(2))
    assert graph.whole["a"] == graph.whole["b"] == proof.SILENT
    assert [g.name for g in graph.groups] == ["c"]


class Auxiliary(Net):
    """A second head in training, as GoogLeNet's; and a layer that nothing calls."""

    def __init__(self) -> None:
        super().__init__()
        self.auxiliary, self.idle = nn.Linear(8, 4), nn.Linear(4, 4)

    def wrong(self, x: Tensor) -> Tensor:
        if self.training:
            self.auxiliary(x.mean((2, 3)))
        return x


def test_layers_that_did_not_run_are_named_and_what_feeds_them_stays() -> None:
    graph = find_groups(Auxiliary().eval(), images(2))
    assert graph.whole["idle"] == "is not called on the example images"
    assert graph.whole["auxiliary"] == "runs in training only"
    assert graph.whole["b"].startswith("the cut model does not run in training: RuntimeError")
    assert [g.name for g in graph.groups] == ["a", "c"]


class Dropping(Net):
    """Draws for every channel, out of the proof's reach."""

    def wrong(self, x: Tensor) -> Tensor:
        return nn.functional.dropout(x, 0.5, self.training)


def test_what_is_drawn_in_training_is_no_difference() -> None:
    assert [g.name for g in find_groups(Dropping().eval(), images(2)).groups] == ["a", "b", "c"]


def test_the_model_is_left_as_it_was() -> None:
    model = lively("resnet20").train()
    before = {n: t.clone() for n, t in model.state_dict().items()}
    find_groups(model, images(2))
    assert model.training
    assert all(torch.equal(t, before[n]) for n, t in model.state_dict().items())


def test_a_copy_that_is_cut_leaves_the_parameters_that_it_shares() -> None:
    model = lively("resnet20")
    groups = find_groups(model, images(2)).groups
    before = {n: t.clone() for n, t in model.state_dict().items()}
    cuts = cuts_of(groups, proof.uneven_plan(groups))
    small, other = copied(model, parameters=False), copied(model)
    shared = {id(p) for p in model.parameters()}
    assert {id(p) for p in small.parameters()} == shared
    cut(small, cuts)
    cut(other, cuts)
    small.train()(images(2))  # which changes buffers
    assert all(torch.equal(t, before[n]) for n, t in model.state_dict().items())
    assert all(
        torch.equal(a, b) for a, b in zip(small.parameters(), other.parameters(), strict=True)
    )


def shifted(cuts: Sequence[Cut], at: int) -> list[Cut]:
    """Another position of one follower."""
    module, side, ids = cuts[at]
    return [*cuts[:at], (module, side, _moved(ids)), *cuts[at + 1 :]]


def _moved(ids: list[int]) -> list[int]:
    """As many positions, one of them another."""
    free = next(i for i in range(len(ids) + 1) if i not in ids)
    return sorted([*ids[1:], free])


def softmax_after(module: str) -> Any:
    """A cutter whose model sends a layer's channels through a softmax besides."""

    def cutter(model: nn.Module, cuts: Sequence[Cut]) -> None:
        cut(model, cuts)
        layer = model.get_submodule(module)
        layer.register_forward_hook(lambda _, __, out: out.softmax(-1 if out.dim() < 4 else 1))

    return cutter


def seeded(seed: int) -> nn.Module:
    """A net of its own for every seed: depth, widths, shortcuts, activations and concatenation."""
    generator = torch.Generator().manual_seed(seed)
    torch.manual_seed(seed)

    def draw(low: int, high: int) -> int:
        return int(torch.randint(low, high, (), generator=generator))

    class Block(nn.Module):
        def __init__(self, width: int) -> None:
            super().__init__()
            middle, self.kind = draw(3, 9), draw(0, 3)
            self.a, self.b = nn.Conv2d(width, middle, 3, padding=1), nn.Conv2d(middle, width, 1)
            self.norm = nn.BatchNorm2d(middle) if draw(0, 2) else nn.Identity()
            self.act = (nn.ReLU(), nn.GELU(), nn.Sigmoid())[draw(0, 3)]
            self.out = 2 * width if self.kind == 2 else width

        def forward(self, x: Tensor) -> Tensor:
            y = self.b(self.act(self.norm(self.a(x))))
            return y if self.kind == 0 else x + y if self.kind == 1 else torch.cat([x, y], 1)

    width = draw(3, 9)
    layers: list[nn.Module] = [nn.Conv2d(3, width, 3, stride=2), nn.ReLU()]
    for _ in range(draw(1, 4)):
        layers.append(Block(width))
        width = layers[-1].out
    layers += [nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(width, 4)]
    return nn.Sequential(*layers).eval()


SEEDS = [0, 1, *(pytest.param(s, marks=pytest.mark.nightly) for s in range(2, 50))]


@pytest.mark.parametrize("seed", SEEDS)
def test_wrong_cutters_are_caught(seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """The proof is not told: a position shifted, a follower forgotten, a softmax over channels."""
    model = seeded(seed)
    graph = find_groups(model, images(2))
    assert len(graph.groups) >= 2
    for g in graph.groups:
        cuts = cuts_of([g], proof.uneven_plan([g]))
        follower = max(i for i, (_, side, _) in enumerate(cuts) if side == "in")
        at = cuts[follower][0]
        for wrong in (
            lambda m, c, i=follower: cut(m, shifted(c, i)),
            lambda m, c, i=follower: cut(m, [*c[:i], *c[i + 1 :]]),
            softmax_after(g.name),
        ):
            with monkeypatch.context() as patch:
                patch.setattr(proof, "cut", wrong)
                trial = Trial(model, images(2), images(2, seed=3), ())
                assert proof.fault(trial, [g]) is not None, (g.name, at)


def test_groups_that_only_fail_together_are_not_cut_together(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    stock = proof.fault

    def fault(trial: Trial, groups: Sequence[Any]) -> str | None:
        return "together" if {"a", "c"} <= {g.name for g in groups} else stock(trial, groups)

    monkeypatch.setattr(proof, "fault", fault)
    graph = find_groups(Dropping().eval(), images(2))
    assert [g.name for g in graph.groups] == ["a", "b"]
    assert graph.whole["c"] == "cannot be cut together with the groups before it"
