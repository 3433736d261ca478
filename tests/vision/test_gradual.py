"""Taylor pruning while the model trains: derivatives, ties, momentum, schedule, cut, resuming."""

from __future__ import annotations

import copy
import itertools
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from vision.architectures import images, lively, small
from vision.test_vision_flow import NET, failing, run, same, settings

from moe_fair.core.plan import Plan
from moe_fair.pipelines import vision as pipeline
from moe_fair.vision import gradual, load_pruned
from moe_fair.vision.data import ImageSet
from moe_fair.vision.finetune import Training
from moe_fair.vision.gates import Gates
from moe_fair.vision.gradual import (
    METHODS,
    Schedule,
    Sums,
    attention,
    default_units,
    minibatches,
    remove_gradually,
    second_order,
)
from moe_fair.vision.graph import BATCH_NORMS, Graph, logits
from moe_fair.vision.plan import Goal, Rules
from moe_fair.vision.proof import find_groups
from moe_fair.vision.settings import SCORED
from moe_fair.vision.size import Sizes
from moe_fair.vision.surgery import cut, cuts_of

pytestmark = pytest.mark.slow  # whole runs, by and large

LABELS = torch.tensor([0, 2, 1, 1, 0, 2])


def tiny() -> tuple[nn.Module, Graph, Tensor]:
    """A net with one shortcut, in float64 and train mode, its groups and six images."""
    torch.manual_seed(0)
    model = small().double()
    with torch.no_grad():
        for p in model.parameters():
            if p.dim() == 1:
                p.uniform_(0.3, 1.2)
    return model.train(), find_groups(model, images(2).double()), images(6).double()[:, :, :12, :12]


def loss_at(model: nn.Module, gates: Gates, values: Tensor, x: Tensor) -> Tensor:
    gates.values = values
    return nn.functional.cross_entropy(logits(model, x), LABELS[: len(x)])


def ones(gates: Gates) -> Tensor:
    return torch.ones(1, gates.total + 1, dtype=torch.float64)


def summed(model: nn.Module, graph: Graph, x: Tensor, method: str, probes: int = 10_000) -> Sums:
    """The sums of one minibatch."""
    with Gates(model, graph.groups) as gates:
        found = Sums(model, graph.groups, gates, Schedule(method, 1, probes=probes))
        model.zero_grad()
        found.add(loss_at(model, gates, ones(gates).requires_grad_(), x))
    return found


def test_first_order_is_the_central_difference_of_the_minibatch_loss() -> None:
    model, graph, x = tiny()
    scores = summed(model, graph, x, "taylor-fo").scores()
    h = 1e-7
    with torch.no_grad(), Gates(model, graph.groups) as gates:
        for unit in range(gates.total):
            step = torch.zeros_like(ones(gates))
            step[0, unit] = h
            up, down = (loss_at(model, gates, ones(gates) + s * step, x) for s in (1, -1))
            slope = (up - down) / (2 * h)
            torch.testing.assert_close(scores[unit], slope.square(), rtol=1e-4, atol=1e-12)


def test_second_order_is_the_diagonal_of_the_dense_hessian() -> None:
    model, graph, x = tiny()
    with Gates(model, graph.groups) as gates:
        dense = torch.autograd.functional.hessian(
            lambda z: loss_at(model, gates, z, x), ones(gates)
        )[0, :-1, 0, :-1]
        values = ones(gates).requires_grad_()
        slope, exact = second_order(loss_at(model, gates, values, x), values, gates.total)
        _, guess = second_order(loss_at(model, gates, values, x), values, gates.total - 1)
    diagonal = dense.diagonal()
    assert float(diagonal.abs().max()) > 1e-3
    torch.testing.assert_close(exact, diagonal, rtol=1e-9, atol=1e-12)
    scores = summed(model, graph, x, "taylor-so").scores()
    torch.testing.assert_close(scores, (-slope + diagonal / 2).square(), rtol=1e-8, atol=1e-14)
    # Hutchinson's variance is the sum of the squares beside the diagonal
    spread = ((dense.square().sum(1) - diagonal.square()) / (gates.total - 1)).sqrt()
    assert bool(((guess - diagonal).abs() < 5 * spread + 1e-12).all())
    assert not torch.allclose(guess, diagonal, rtol=1e-6, atol=1e-9)


def test_second_order_runs_through_attention() -> None:
    """Against differences of first derivatives, which take the fused attention."""
    model = lively("vit").double()
    graph = find_groups(model, images(2).double())
    x, h = images(4).double(), 1e-5
    with Gates(model, graph.groups) as gates:
        v = torch.zeros_like(ones(gates))
        v[0, 5] = h
        values = ones(gates).requires_grad_()
        with attention(twice=True):
            loss = loss_at(model, gates, values, x)
        _, exact = second_order(loss, values, gates.total)
        slopes = []
        for z in (ones(gates) + v, ones(gates) - v):
            z.requires_grad_()
            loss_at(model, gates, z, x).backward()
            slopes.append(z.grad[0, 5])
    torch.testing.assert_close(exact[5], (slopes[0] - slopes[1]) / (2 * h), rtol=1e-5, atol=1e-10)


def norm_slopes(model: nn.Module, x: Tensor) -> dict[str, Tensor]:
    """Batch normalisation -> [C] derivative of the loss by a factor on its outputs, by hooks."""
    factors, handles = {}, []
    for name, layer in model.named_modules():
        if isinstance(layer, BATCH_NORMS):
            z = factors[name] = torch.ones(layer.num_features, dtype=x.dtype, requires_grad=True)
            handles.append(
                layer.register_forward_hook(lambda _, __, out, z=z: out * z[:, None, None])
            )
    nn.functional.cross_entropy(logits(model, x), LABELS).backward()
    for handle in handles:
        handle.remove()
    return {n: z.grad for n, z in factors.items() if z.grad is not None}


def test_tied_units_share_a_gate_that_equals_gates_behind_batch_normalisation() -> None:
    model, graph, x = tiny()
    slopes = norm_slopes(model, x)
    first = summed(model, graph, x, "taylor-fo").first
    norms = summed(model, graph, x, "taylor-bn").scores()
    tied = 0
    with Gates(model, graph.groups) as gates:
        assert gates.total == sum(g.units.size for g in graph.groups)
        for g in graph.groups:
            units = slice(gates.offsets[g.name], gates.offsets[g.name] + g.units.size)
            parts = [slopes[m.module] for m in g.members if m.module in slopes]
            tied += len(parts) > 1
            # one gate for all members: its derivative is the sum of theirs
            torch.testing.assert_close(first[units], sum(parts), rtol=1e-8, atol=1e-13)
            squares = sum(p.square() for p in parts)
            torch.testing.assert_close(norms[units], squares, rtol=1e-7, atol=1e-15)
    assert tied  # the shortcut
    assert tied < len(graph.groups)


def pictured(count: int = 26, size: int = 12) -> ImageSet:
    x = images(count)[:, :, :size, :size]
    return ImageSet(lambda i: i, [i % 3 for i in range(count)], "abc", lambda i: x[i], "noise")


def test_scores_carry_momentum_and_the_lowest_of_all_groups_leave() -> None:
    torch.manual_seed(0)
    model = small()
    graph = find_groups(model, images(2))
    sizes = Sizes(model, graph.groups, images(1)[:, :, :12, :12])
    total = sum(g.size for g in graph.units)
    training = Training(0, learning_rate=1e-20, batch_size=6)  # weights stay as they are
    plan, steps = remove_gradually(
        copy.deepcopy(model), graph, sizes, pictured(), training=training,
        schedule=Schedule("taylor-fo", 3, minibatches=2, momentum=0.7),
        goal=Goal(units=total - 7), rules=Rules("global"),
    )  # fmt: skip
    assert [s["units"] for s in steps] == [total - 3, total - 6, total - 7]
    there, scores, left = torch.ones(total), torch.zeros(total, dtype=torch.float64), []
    batches = minibatches(pictured(), 6, 0)
    with Gates(model.train(), graph.groups) as gates:
        for step, leave in enumerate((3, 3, 1)):
            squares = torch.zeros(total, dtype=torch.float64)
            for _, (x, y) in itertools.islice(batches, 2):
                z = torch.cat([there, torch.ones(1)])[None].requires_grad_()
                gates.values = z
                nn.functional.cross_entropy(logits(model, x), y).backward()
                squares += z.grad[0, :-1].double().square() / 2
            scores = 0.7 * scores + 0.3 * squares if step else squares
            alive = torch.where(there > 0, scores, torch.inf)
            # no group here is as small as what leaves, so no floor interferes
            gone = alive.argsort()[:leave]
            there[gone] = 0
            left += gone.tolist()
        wanted = {
            g.name: [i for i in range(g.size) if gates.offsets[g.name] + i not in left]
            for g in graph.units
        }
    assert plan.kept == wanted


def test_minibatches_go_on_anywhere_and_every_epoch_shows_each_image_once() -> None:
    every = list(itertools.islice(minibatches(pictured(24), 6, 3), 12))
    assert [n for n, _ in every] == list(range(12))
    for start in (4, 7):
        later = itertools.islice(minibatches(pictured(24), 6, 3, start), 12 - start)
        for (n, (x, y)), (m, (u, v)) in zip(every[start:], later, strict=True):
            assert n == m
            assert torch.equal(x, u)
            assert torch.equal(y, v)
    means = [torch.cat([x for _, (x, _) in every[e : e + 4]]).mean((1, 2, 3)) for e in (0, 4, 8)]
    orders = [m.argsort().tolist() for m in means]
    assert orders[0] != orders[1] != orders[2]
    assert all(torch.equal(m.sort().values, means[0].sort().values) for m in means)
    assert len(list(itertools.islice(minibatches(pictured(4), 6, 0), 2))[1][1][0]) == 4


@pytest.mark.parametrize(
    ("name", "method", "align"),
    [
        ("resnet20", "taylor-so", 1),
        pytest.param("regnet_x", "taylor-fo", 1, marks=pytest.mark.nightly),
        ("resnet20", "taylor-bn", 4),
    ],
)
def test_the_cut_model_is_the_masked_one_and_the_target_is_met(
    name: str, method: str, align: int
) -> None:
    model = lively(name)
    x = images(4)
    graph = find_groups(model, x)
    sizes = Sizes(model, graph.groups, x)
    goal = Goal(operations=int(0.6 * sizes.whole.operations))
    plan, steps = remove_gradually(
        model, graph, sizes, pictured(12, 32), schedule=Schedule(method, 40, minibatches=2),
        training=Training(0, learning_rate=1e-4, batch_size=6), goal=goal,
        rules=Rules("global", align=align),
    )  # fmt: skip
    assert len(steps) > 1
    operations = [s["operations"] for s in steps]
    assert operations == sorted(operations, reverse=True)
    with torch.no_grad(), Gates(model, graph.groups) as gates:
        gates.close(plan.kept, graph.groups)
        masked = logits(model, x)
    cut(model, cuts_of(graph.groups, plan.kept))
    with torch.no_grad():
        pruned = logits(model, x)
    torch.testing.assert_close(pruned, masked, rtol=1e-5, atol=1e-5 * float(masked.abs().max()))
    found = Sizes(model, (), x).whole
    assert found.operations == plan.explanation["operations_after"] == operations[-1]
    assert found.operations <= goal.operations
    assert all(len(k) % align == 0 for k in plan.kept.values())


def test_a_diverging_training_is_said() -> None:
    model = lively("resnet20")
    x = images(2)
    graph = find_groups(model, x)
    with pytest.raises(ValueError, match=r"the loss is (nan|inf) in step \d: .* lower --lr"):
        remove_gradually(
            model, graph, Sizes(model, graph.groups, x), pictured(12, 32),
            schedule=Schedule("taylor-fo", 1, minibatches=4), rules=Rules("global"),
            training=Training(0, learning_rate=1e30, batch_size=6), goal=Goal(units=100),
        )  # fmt: skip


def gradually(pictures: Path, **more: Any) -> Any:
    wanted = {
        "method": "taylor-so", "units_per_step": 3, "minibatches": 2, "ratio": None,
        "flops": 0.5, "finetune_epochs": 1, **more,
    }  # fmt: skip
    plain = {k: v for k, v in settings(pictures).plain().items() if k not in SCORED}
    return pipeline.Settings.of({**plain, **wanted})


def test_a_killed_run_goes_on_to_the_same_model(
    pictures: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stock = pipeline.latency
    monkeypatch.setattr(pipeline, "latency", lambda models, x: stock(models, x, seconds=0))
    wanted = gradually(pictures)
    whole = pipeline.prune(wanted, tmp_path / "whole")
    assert len(whole.result["steps"][0]["removal"]) > 3
    decide, calls = gradual._next, []

    def stops(*args: Any) -> Any:
        calls.append(args)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return decide(*args)

    monkeypatch.setattr(gradual, "_next", stops)
    with pytest.raises(KeyboardInterrupt):
        pipeline.prune(wanted, tmp_path / "out")
    monkeypatch.setattr(gradual, "_next", decide)
    said: list[str] = []
    done = pipeline.prune(wanted, tmp_path / "out", say=said.append)
    assert "going on after step 2" in said
    assert done.result["steps"] == whole.result["steps"]
    models = [load_pruned(p.output, trust_remote_code=True) for p in (done, whole)]
    assert same(*models)
    plans = [Plan.load(p.output / "moe_fair" / "plan.json") for p in (done, whole)]
    assert plans[0] == plans[1]
    assert not (tmp_path / "out.pruning").exists()


def test_the_command(
    pictures: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: Any
) -> None:
    stock = pipeline.latency
    monkeypatch.setattr(pipeline, "latency", lambda models, x: stock(models, x, seconds=0))
    out = tmp_path / "out"
    run(NET, "--data", pictures, "--method", "taylor-fo", "--flops", "0.4", "--units-per-step", "2",
        "--minibatches", "2", "--momentum", "0.5", "--batch-size", "8", "--image-size", "16",
        "--distill", "0.3", "-o", out)  # fmt: skip
    said = capsys.readouterr()
    assert "global on taylor-fo" in said.out
    assert "step 1: loss" in said.err
    result = json.loads((out / "moe_fair" / "result.json").read_text())
    cost = result["cost"]
    assert cost["pruned"]["operations"] <= 0.6 * cost["dense"]["operations"]
    steps = result["steps"][0]["removal"]
    assert steps[-1]["operations"] == cost["pruned"]["operations"]
    assert steps[0]["units"] - steps[1]["units"] == 2
    assert result["steps"][0]["schedule"] == {
        "method": "taylor-fo", "units": 2, "minibatches": 2, "momentum": 0.5, "probes": 1,
    }  # fmt: skip
    assert "allocate" not in result["settings"]  # nothing that was not used
    assert "units that left in an earlier one have 0" in said.out
    page = (out / "moe_fair" / "report.html").read_text()
    assert "Removal while training" in page
    assert page.count("data:image/png;base64,") == 3
    load_pruned(out, trust_remote_code=True)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--method", "taylor-fo2"], "is not one of taylor-fo, taylor-so, taylor-bn"),
        (["--method", "taylor-fo", "--removal", "l1"], "--removal is not used with --method"),
        (["--method", "taylor-fo", "--max-memory", "1GiB"], "--max-memory is not used with"),
        (["--method", "taylor-fo", "--steps", "3"], "--steps is not used with --method"),
        (["--method", "taylor-fo", "--probes", "3"], "--probes is of --method taylor-so"),
        (["--method", "taylor-so", "--probes", "0"], "--probes 0 is below 1"),
        (["--method", "taylor-fo", "--momentum", "1"], "--momentum 1 is not from 0 to below 1"),
        (["--method", "taylor-fo", "--units-per-step", "0"], "--units-per-step 0 is below 1"),
        (["--minibatches", "3"], "--minibatches belongs to --method"),
        (["--method", "taylor-fo", "--flops", "0.9999"], "the target is out of reach"),
    ],
)
def test_bad_options(
    pictures: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    arguments: list[str],
    said: str,
) -> None:
    target = [] if "--flops" in arguments else ["--flops", "0.4"]
    line = failing(
        capsys, NET, "--data", pictures, "--image-size", "16", *target, *arguments, "-o",
        tmp_path / "out",
    )  # fmt: skip
    assert said in line, line


def test_a_tolerance_and_a_model_without_normalisation_are_refused(pictures: Path) -> None:
    with pytest.raises(ValueError, match="--tolerance is ToD's"):
        gradually(pictures, flops=None, tolerance=0.1)
    model = lively("vit")
    groups = find_groups(model, images(2)).groups
    with pytest.raises(ValueError, match=r"taylor-bn needs batch normalisation .* has none"):
        gradual.check_method(model, groups, "taylor-bn")
    gradual.check_method(model, groups, "taylor-so")


def test_default_units_are_the_papers_in_large_models() -> None:
    assert [default_units(n) for n in (30, 448, 9_999, 26_000)] == [1, 5, 100, 100]
    assert METHODS == ("taylor-fo", "taylor-so", "taylor-bn")
