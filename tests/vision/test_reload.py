"""A result comes back from its files in a process of its own, or the run says so at its start."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from vision.architectures import small
from vision.test_vision_flow import settings

from moe_fair.pipelines import sparse
from moe_fair.pipelines import vision as pipeline
from moe_fair.vision import load_pruned, reload
from moe_fair.vision.graph import logits
from moe_fair.vision.load import build, load_weights
from moe_fair.vision.sparse.settings import SparseSettings

HERE = "vision.test_reload"


class Versioned(nn.Module):
    """Refuses a state without its version, as torchvision's MNASNet."""

    _version = 2

    def __init__(self) -> None:
        super().__init__()
        self.net = small()

    def _load_from_state_dict(self, state: Any, prefix: str, metadata: Any, *more: Any) -> None:
        if metadata.get("version") != 2:
            raise ValueError("version should be 2")
        super()._load_from_state_dict(state, prefix, metadata, *more)

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x)


class Aliased(nn.Module):
    """A layer under two names, and two layers with one weight."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = nn.Conv2d(3, 6, 3), nn.Conv2d(6, 6, 1), nn.Conv2d(6, 6, 1)
        self.again, self.c.weight = self.b, self.b.weight
        self.d, self.head = nn.Conv2d(6, 6, 1), nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.again(self.b(self.a(x).relu()).relu())
        return self.head(self.d(self.c(x).relu()).relu().mean((2, 3)))


def weight_normed() -> nn.Module:
    """By the hook of old."""
    net = small()
    with pytest.warns(FutureWarning, match="weight_norm"):
        net.classifier = nn.utils.weight_norm(net.classifier)
    return net


def compiled() -> nn.Module:
    return torch.compile(small())  # type: ignore[return-value]


def versioned() -> nn.Module:
    return Versioned()


def aliased() -> nn.Module:
    return Aliased()


@pytest.mark.slow
@pytest.mark.parametrize(
    "name",
    [
        "aliased",
        "weight_normed",
        pytest.param("versioned", marks=pytest.mark.nightly),
        pytest.param("compiled", marks=pytest.mark.nightly),
    ],
)
def test_models_whose_states_are_peculiar(pictures: Path, tmp_path: Path, name: str) -> None:
    wanted = settings(pictures, model=f"{HERE}:{name}", removal="l1", allocate="uniform")
    done = pipeline.prune(wanted, tmp_path / "out")
    model = load_pruned(done.output, trust_remote_code=True)
    assert any(len(g.kept) < g.size for g in done.plans[0].groups)
    assert logits(model, torch.rand(2, 3, 16, 16)).shape == (2, 3)


class Drawn(nn.Module):
    """Computes with what is in no file."""

    def __init__(self) -> None:
        super().__init__()
        self.net, self.factor = small(), torch.rand(3)

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x) * self.factor


def drawn() -> nn.Module:
    return Drawn()


def scripted() -> nn.Module:
    return torch.jit.script(nn.Sequential(nn.Conv2d(3, 4, 1)))


def lazy() -> nn.Module:
    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.Flatten(), nn.LazyLinear(3))


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("drawn", "saved and built again, gives other outputs"),
        ("lazy", "2.weight has no size before the first images are seen"),
    ],
)
def test_what_cannot_come_back_is_refused_at_the_start(
    pictures: Path, tmp_path: Path, name: str, said: str
) -> None:
    with pytest.raises(ValueError, match=said):
        pipeline.prune(settings(pictures, model=f"{HERE}:{name}"), tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_scripted_models_are_refused_in_words() -> None:
    base = {"kind": "function", "module": HERE, "function": "scripted", "arguments": [],
            "keywords": {}}  # fmt: skip
    with (
        pytest.warns(DeprecationWarning, match="jit"),
        pytest.raises(ValueError, match="a scripted model"),
    ):
        build(base, trusted=True)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["prune", "sparsify"])
def test_a_result_that_another_process_reads_otherwise_gets_no_name(
    pictures: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    """The module's file is changed while the run works: this process goes on with what it read."""
    (tmp_path / "net_of_mine.py").write_text("from vision.architectures import small\n")
    monkeypatch.syspath_prepend(tmp_path)
    run: Any = pipeline if kind == "prune" else sparse
    stock = run.save_pruned

    def changes(*arguments: Any) -> None:
        stock(*arguments)
        (tmp_path / "net_of_mine.py").write_text(
            "from torch import nn\nfrom vision.architectures import small as stock\n\n"
            "def small():\n    net = stock()\n"
            "    net.register_forward_hook(lambda m, x, out: 2 * out)\n    return net\n"
        )

    monkeypatch.setattr(run, "save_pruned", changes)
    common = {"model": "net_of_mine:small", "data": str(pictures), "image_size": 16}

    def work() -> None:
        if kind == "prune":
            pipeline.prune(settings(pictures, **common), tmp_path / "out")
        else:
            sparse.sparsify(SparseSettings.of({**common, "sparsity": 0.5}), tmp_path / "out")

    with pytest.raises(RuntimeError, match=r"a process of its own, gives other outputs .*partial"):
        work()
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
def test_a_result_that_another_process_cannot_build_says_why(
    tmp_path: Path, pictures: Path
) -> None:
    images = torch.rand(2, 3, 16, 16)
    with (
        pytest.raises(RuntimeError, match="no pruned image model at"),
        reload.checked_afresh(tmp_path, small(), images),
    ):
        pass


@pytest.mark.parametrize("left_out", [(), ("num_batches_tracked",)])
def test_weights_of_before_batches_were_counted(left_out: tuple[str, ...], tmp_path: Path) -> None:
    """Layers bring an old layout up to theirs, as where a file has no versions at all."""
    model = nn.Sequential(nn.Conv2d(1, 2, 1), nn.BatchNorm2d(2))
    state = {
        n: t + 1 for n, t in model.state_dict().items() if not (left_out and n.endswith(left_out))
    }
    save_file(state, tmp_path / "w.safetensors")
    load_weights(model, tmp_path / "w.safetensors")
    assert torch.equal(model[1].running_mean, state["1.running_mean"])
    assert int(model[1].num_batches_tracked) == (0 if left_out else 1)


def test_weights_that_lack_a_layer(tmp_path: Path) -> None:
    model = nn.Sequential(nn.Conv2d(1, 2, 1), nn.BatchNorm2d(2))
    state = {n: t for n, t in model.state_dict().items() if n != "0.bias"}
    save_file(state, tmp_path / "w.safetensors")
    with pytest.raises(ValueError, match="does not fit the model"):
        load_weights(model, tmp_path / "w.safetensors")
