"""Every architecture, cut at a non-uniform plan: equal to the masked original, saved, trained.

The masking here is its own code: it silences a unit where it is made (filters, biases, batch
normalisations), while the package's gates, and its proof, silence it where it is read.
"""

from __future__ import annotations

import copy
import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from processes import python
from safetensors.torch import load_file, save_file
from torch import nn
from vision.architectures import ARCHITECTURES, images, lively

from moe_fair.vision.checkpoint import save_pruned
from moe_fair.vision.graph import ChannelGroup, Graph, logits
from moe_fair.vision.load import Source
from moe_fair.vision.preprocessing import Preprocessing
from moe_fair.vision.proof import fault, find_groups, uneven_plan
from moe_fair.vision.surgery import cut, cuts_of
from moe_fair.vision.trial import Trial

PREPROCESSING = Preprocessing(channels=3, size=32)
QUICK = ("vgg16_bn", "resnet20", "densenet40", "resnet50", "convnext", "vit", "regnet_y")
ALIKE = ("resnet18", "resnet56", "regnet_x")  # to resnet50, resnet20 and regnet_y


def _marks(name: str) -> list[pytest.MarkDecorator]:
    slow = [] if name in QUICK else [pytest.mark.slow]
    return [*slow, pytest.mark.nightly] if name in ALIKE else slow


PARAMS = [pytest.param(n, marks=_marks(n)) for n in ARCHITECTURES]


@pytest.fixture(scope="module", params=PARAMS)
def traced(request: pytest.FixtureRequest) -> tuple[str, nn.Module, Graph]:
    model = lively(request.param)
    return request.param, model, find_groups(model, images(2))


def silenced(
    model: nn.Module, groups: Sequence[ChannelGroup], kept: Mapping[str, Sequence[int]]
) -> nn.Module:
    """A copy in which what makes the other units makes zeros."""
    masked = copy.deepcopy(model)
    with torch.no_grad():
        for g in groups:
            for m in g.members:
                if m.side == "in":
                    continue
                layer: Any = masked.get_submodule(m.module)
                for unit in set(range(g.units.size)) - set(kept[g.name]):
                    rows = list(m.index[unit])
                    layer.weight[rows] = 0
                    if layer.bias is not None:
                        layer.bias[rows] = 0
    return masked


def test_cut_equals_the_masked_original(traced: tuple[str, nn.Module, Graph]) -> None:
    _, model, graph = traced
    kept = uneven_plan(graph.groups, seed=5)
    shares = {len(kept[g.name]) / g.units.size for g in graph.groups}
    assert len(shares) > 1 or len(graph.groups) == 1
    pruned = copy.deepcopy(model)
    cut(pruned, cuts_of(graph.groups, kept))
    x = images()
    with torch.no_grad():
        wanted = logits(silenced(model, graph.groups, kept), x)
        got, dense = logits(pruned, x), logits(model, x)
    scale = float(dense.abs().max())
    assert float((got - wanted).abs().max()) < 1e-5 * max(1.0, scale)
    assert float((dense - wanted).abs().max()) > 1e-2 * scale  # the plan does change the model


@pytest.mark.slow
def test_every_group_alone_is_exact_in_float64(traced: tuple[str, nn.Module, Graph]) -> None:
    _, model, graph = traced
    trial = Trial(model, images(2), images(2, seed=2), [])
    assert len(trial.probes) >= 2
    for g in graph.groups[:: max(1, len(graph.groups) // 6)]:
        assert fault(trial, [g]) is None, g.name


def test_a_pruned_model_trains(traced: tuple[str, nn.Module, Graph]) -> None:
    _, model, graph = traced
    pruned = copy.deepcopy(model).train()
    cut(pruned, cuts_of(graph.groups, uneven_plan(graph.groups)))
    before = {n: p.detach().clone() for n, p in pruned.named_parameters()}
    optimizer = torch.optim.SGD(pruned.parameters(), lr=1e-2)
    labels = torch.arange(4)
    nn.functional.cross_entropy(logits(pruned, images()), labels).backward()
    optimizer.step()
    assert all(p.grad is not None for p in pruned.parameters())
    moved = [n for n, p in pruned.named_parameters() if not torch.equal(p, before[n])]
    assert len(moved) > 0.8 * len(before)


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Every architecture cut and saved, with its outputs beside."""
    folder, found = tmp_path_factory.mktemp("pruned"), {}
    for name in ARCHITECTURES:
        model = lively(name)
        groups = find_groups(model, images(2)).groups
        cuts = cuts_of(groups, uneven_plan(groups, seed=7))
        cut(model, cuts)
        if hasattr(model, "config"):
            base = {"kind": "transformers", "class": type(model).__name__}
        else:
            base = {"kind": "function", "module": "vision.architectures", "function": "built",
                    "arguments": [name], "keywords": {}}  # fmt: skip
        found[name] = folder / name
        found[name].mkdir()
        source = Source(model, base, PREPROCESSING, PREPROCESSING, None, None)
        save_pruned(model, source, [cuts], found[name])
        with torch.no_grad():
            save_file({"logits": logits(model, images())}, found[name] / "expected.safetensors")
    return found


LOAD = """
import sys, torch
from pathlib import Path
from safetensors.torch import save_file
from vision.architectures import images
from moe_fair.vision import load_pruned
from moe_fair.vision.graph import logits
torch.set_num_threads(int(sys.argv[1]))
for folder in map(Path, sys.argv[2:]):
    model = load_pruned(folder, trust_remote_code=True)
    assert not model.training
    with torch.no_grad():
        save_file({"logits": logits(model, images())}, folder / "loaded.safetensors")
assert "torch_pruning" not in sys.modules
"""


@pytest.mark.slow
@pytest.mark.nightly
def test_loads_in_a_fresh_process_bitwise_equal(saved: dict[str, Path]) -> None:
    tests = Path(__file__).parent.parent
    path = os.pathsep.join([str(tests), str(tests.parent)])
    threads = str(torch.get_num_threads())  # another number adds up in another order
    done = python("-c", LOAD, threads, *saved.values(), env={**os.environ, "PYTHONPATH": path})
    assert done.returncode == 0, done.stderr[-2000:]
    for name, folder in saved.items():
        expected = load_file(folder / "expected.safetensors")["logits"]
        assert torch.equal(load_file(folder / "loaded.safetensors")["logits"], expected), name
        assert not [p for p in folder.iterdir() if p.suffix in (".bin", ".pt", ".pth", ".pkl")]
        record = json.loads((folder / "pruned.json").read_text())
        assert record["history"][0], name


def test_attention_heads_are_left_whole_unless_asked() -> None:
    model = lively("vit")
    plain, asked = (find_groups(model, images(2), heads=h) for h in (False, True))
    assert len(plain.groups) == 3
    assert sum("heads" in why for why in plain.whole.values()) == 3
    heads = {g.name: g.units.size for g in asked.groups if g.units.size == 4}
    assert len(heads) == 3
    kept = {g.name: [0, 2] if g.name in heads else range(g.units.size) for g in asked.groups}
    pruned = copy.deepcopy(model)
    cut(pruned, cuts_of(asked.groups, kept))
    with torch.no_grad():
        wanted = logits(silenced(model, asked.groups, kept), images())
        torch.testing.assert_close(logits(pruned, images()), wanted, rtol=1e-5, atol=1e-5)


def test_grouped_convolutions_keep_equal_numbers() -> None:
    model = lively("regnet_x")
    graph = find_groups(model, images(2))
    grouped = next(g for g in graph.groups if g.units.blocks > 1)
    width = grouped.units.size // grouped.units.blocks
    kept = {grouped.name: list(range(1, grouped.units.size))}  # one unit short in one block
    assert width > 1
    with pytest.raises(ValueError, match="unequal numbers of channels"):
        cut(copy.deepcopy(model), cuts_of(graph.groups, kept))


def test_cuts_of_another_model_are_refused() -> None:
    model = lively("resnet20")
    with pytest.raises(ValueError, match="no layer"):
        cut(model, [("features.0", "out", [1])])
    with pytest.raises(ValueError, match="cannot take"):
        cut(model, [("conv1", "out", [99])])


class Normalised(nn.Module):
    """A stream that is normalised over its channels cannot lose one."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.norm = nn.Conv2d(3, 8, 3), nn.GroupNorm(1, 8)
        self.b, self.head = nn.Conv2d(8, 8, 3), nn.Linear(8, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.b(self.norm(self.a(x))).mean((2, 3)))


def test_what_cannot_be_cut_exactly_is_left_whole_with_its_reason() -> None:
    graph = find_groups(Normalised().eval(), images(2))
    assert [g.name for g in graph.groups] == ["b"]
    assert "GroupNorm" in graph.whole["a"]
    assert graph.whole["head"] == "sets the model's outputs"


def test_a_model_with_nothing_to_cut_is_refused() -> None:
    head = nn.Sequential(nn.Flatten(), nn.Linear(3 * 32 * 32, 4))
    with pytest.raises(ValueError, match="no channels of this model can be cut"):
        find_groups(head.eval(), images(2))
