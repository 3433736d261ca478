"""Gate Taylor values against finite differences, and why the weight form is not the default."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
from torch import nn
from vision.architectures import images, lively

from moe_fair.vision.collect import collect, logit_changes, taylor
from moe_fair.vision.criteria import criterion
from moe_fair.vision.gates import Gates
from moe_fair.vision.graph import Graph, logits
from moe_fair.vision.oracle import loss_changes
from moe_fair.vision.proof import find_groups
from moe_fair.vision.surgery import cut, cuts_of
from moe_fair.vision.unit_outputs import MeasureConfig

LABELS = torch.tensor([0, 3, 1, 7, 3, 9])


@pytest.fixture(
    scope="module",
    params=["resnet20", pytest.param("densenet40", marks=pytest.mark.nightly), "vit"],
)
def problem(request: pytest.FixtureRequest) -> tuple[nn.Module, Graph]:
    model = lively(request.param).double()
    return model, find_groups(model, images(2).double())


def losses(model: nn.Module, x: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        return nn.functional.cross_entropy(logits(model, x), LABELS, reduction="none")


def test_open_gates_have_the_gradients_of_a_product(problem: tuple[nn.Module, Graph]) -> None:
    model, graph = problem
    x = images(6).double()
    found = []
    with Gates(model, graph.groups) as gates:
        for given in (False, True):
            gates.open(len(x), torch.float64, x.device)
            if given:  # not known to be 1
                gates.values = gates.values.detach().clone().requires_grad_()
            loss = nn.functional.cross_entropy(logits(model, x), LABELS, reduction="sum")
            found += [loss, *torch.autograd.grad(loss, gates.values)]
    assert float(found[1][:, :-1].abs().min(0).values.max()) > 0
    assert torch.equal(found[0], found[2])
    assert torch.equal(found[1], found[3])


@pytest.mark.slow
def test_gate_form_equals_finite_differences(problem: tuple[nn.Module, Graph]) -> None:
    model, graph = problem
    x = images(6).double()
    rows, _ = taylor(model, graph, x, LABELS, MeasureConfig(batch_size=4))
    h = 1e-7  # small: few activations cross a kink of ReLU on the way
    picked = graph.groups[:: max(1, len(graph.groups) // 5)]
    for g in picked:
        with Gates(model, graph.groups) as gates:
            for unit in (0, g.units.size - 1):
                found = []
                for z in (1 + h, 1 - h):
                    gates.values = torch.ones(1, gates.total + 1, dtype=torch.float64)
                    gates.values[0, gates.offsets[g.name] + unit] = z
                    found.append(losses(model, x))
                wanted = (found[0] - found[1]) / (2 * h)
                scale = rows[g.name].abs().max()
                torch.testing.assert_close(
                    rows[g.name][:, unit], wanted, rtol=1e-5, atol=1e-6 * float(scale)
                )


def test_batches_change_nothing_and_the_model_is_left_as_it_was() -> None:
    model = lively("resnet20").train()
    model.conv1.weight.requires_grad_(False)
    state = copy.deepcopy(model.state_dict())
    graph = find_groups(model, images(2))
    needs = ["rows", "u_score", "weight_taylor"]
    found = [
        collect(model, graph, images(6), LABELS, needs=needs, watch=MeasureConfig(batch_size=b))
        for b in (2, 6)
    ]
    for name, rows in found[0].rows.items():
        torch.testing.assert_close(rows, found[1].rows[name], rtol=1e-3, atol=1e-6)
    assert model.training
    assert not model.conv1.weight.requires_grad
    assert model.classifier.weight.requires_grad
    assert all(p.grad is None for p in model.parameters())
    assert all(torch.equal(t, state[n]) for n, t in model.state_dict().items())


def test_criteria_are_their_formulas() -> None:
    model = lively("vgg16_bn")
    graph = find_groups(model, images(2))
    found = collect(model, graph, images(6), LABELS, needs=["rows", "weight_taylor"])
    g = graph.groups[3]
    t = found.rows[g.name].numpy()
    for name, wanted in (
        ("taylor", np.abs(t.mean(0))),
        ("taylor-sq", (t**2).mean(0)),
        ("taylor-so", ((0.5 * t**2 - t) ** 2).mean(0)),
    ):
        np.testing.assert_allclose(criterion(name)(found).values[g.name], wanted, rtol=1e-6)


def test_logit_form_is_exact_where_the_logits_are_linear_in_the_gate() -> None:
    """The last channels of a VGG go through pooling alone: the loss without them, exactly."""
    model = lively("vgg16_bn").double()
    graph = find_groups(model, images(2).double())
    x = images(6).double()
    found = logit_changes(model, graph, x, LABELS, MeasureConfig(batch_size=4))
    last = graph.groups[-1:]
    wanted = loss_changes(model, last, x, LABELS)[last[0].name]
    assert float(wanted.abs().max()) > 1e-3
    torch.testing.assert_close(found[last[0].name], wanted, rtol=1e-9, atol=1e-12)
    statistics = collect(model, graph, x, LABELS, needs=["logit_change", "logit_change_sq"])
    for name, form in (("taylor-logits", wanted), ("taylor-logits-sq", wanted.square())):
        score = criterion(name)(statistics).values[last[0].name]
        torch.testing.assert_close(score, form.mean(0), rtol=1e-7, atol=1e-12)


def test_logit_form_is_its_formula() -> None:
    model = lively("vit").double()
    graph = find_groups(model, images(2).double())
    x = images(6).double()
    frozen = next(model.parameters())
    frozen.requires_grad_(False)
    found = logit_changes(model, graph, x, LABELS, MeasureConfig(batch_size=4))
    assert not frozen.requires_grad
    frozen.requires_grad_(True)
    assert all(p.requires_grad and p.grad is None for p in model.parameters())
    image, cross_entropy = 4, nn.functional.cross_entropy
    with Gates(model, graph.groups) as gates:

        def outputs(z: torch.Tensor) -> torch.Tensor:
            gates.values = z
            return logits(model, x[image : image + 1])[0]

        ones = torch.ones(1, gates.total + 1, dtype=torch.float64)
        slopes = torch.autograd.functional.jacobian(outputs, ones)[:, 0]
        with torch.no_grad():
            f = outputs(ones)
    for g in graph.groups:
        for unit in (0, g.units.size - 1):
            moved = f - slopes[:, gates.offsets[g.name] + unit]
            wanted = cross_entropy(moved, LABELS[image]) - cross_entropy(f, LABELS[image])
            torch.testing.assert_close(found[g.name][image, unit], wanted, rtol=1e-8, atol=1e-11)


def weight_sums(model: nn.Module, layer: nn.Conv2d, x: torch.Tensor) -> torch.Tensor:
    """[C] |Σ w·∂L/∂w| of a convolution's filters, in the model's present mode."""
    model.zero_grad()
    nn.functional.cross_entropy(logits(model, x), LABELS).backward()
    assert layer.weight.grad is not None
    return (layer.weight.detach() * layer.weight.grad).flatten(1).sum(1).abs()


def test_weight_form_is_the_sum_over_filters() -> None:
    model = lively("vgg16_bn").double()
    graph = find_groups(model, images(2).double())
    x = images(6).double()
    found = collect(
        model, graph, x, LABELS, needs=["weight_taylor"], watch=MeasureConfig(batch_size=4)
    )
    scores = criterion("taylor-weight")(found).values
    wanted = weight_sums(model.eval(), model.features[3], x)
    torch.testing.assert_close(scores["features.3"], wanted, rtol=1e-6, atol=1e-12)


def test_in_train_mode_the_weight_form_vanishes_before_batch_normalisation() -> None:
    """Why the R-Score is the gate form in eval mode.

    Batch statistics make the loss blind to a filter's scale: L(c·w) = L(w) for every c > 0, so by
    Euler Σ w·∂L/∂w = 0, and what is left of it ranks rounding errors (up to the ε of the
    normalisation). The paper's package takes it there.
    """
    model = lively("vgg16_bn").double()
    x = images(6).double()
    layer = model.features[3]
    for bn in (m for m in model.modules() if isinstance(m, nn.BatchNorm2d)):
        bn.eps = 1e-12
    alive = weight_sums(model.eval(), layer, x)
    batch = weight_sums(model.train(), layer, x)
    assert float(batch.max()) < 1e-6 * float(alive.max())


def test_oracle_is_the_loss_of_the_cut_model() -> None:
    model = lively("resnet20").double()
    graph = find_groups(model, images(2).double())
    x = images(6).double()
    groups = graph.groups[2:4]
    changes = loss_changes(model, groups, x, LABELS)
    before = losses(model, x)
    for g in groups:
        for unit in (0, 3):
            smaller = copy.deepcopy(model)
            kept = {g.name: [i for i in range(g.units.size) if i != unit]}
            cut(smaller, cuts_of([g], kept))
            wanted = losses(smaller, x) - before
            torch.testing.assert_close(changes[g.name][:, unit], wanted, rtol=1e-6, atol=1e-9)
