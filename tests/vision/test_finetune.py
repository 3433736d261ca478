"""Fine-tuning: the losses by hand, presets, and a killed run that goes on."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from moe_fair.vision import finetune as module
from moe_fair.vision import zoo
from moe_fair.vision.data import ImageSet, open_data
from moe_fair.vision.finetune import Training, finetune, loss_of
from moe_fair.vision.preprocessing import Preprocessing


@pytest.fixture(scope="module")
def train(pictures: Path) -> ImageSet:
    return open_data(str(pictures), Preprocessing(channels=3, size=16)).train


def net(seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    return zoo.VGG([4, "M", 8], num_classes=3, in_channels=3)


def test_it_learns_and_leaves_eval_mode(train: ImageSet) -> None:
    said: list[str] = []
    training = Training(epochs=8, optimizer="adamw", learning_rate=3e-2, batch_size=8)
    model = finetune(net(), train, training, say=said.append)
    assert not model.training
    losses = [float(line.split()[-1]) for line in said]
    assert len(losses) == 8
    assert losses[-1] < 0.5 * losses[0]


def test_training_that_diverges_ends_with_the_epoch(train: ImageSet) -> None:
    said: list[str] = []
    with pytest.raises(ValueError, match=r"training diverged: .* lower --lr"):
        finetune(net(), train, Training(3, learning_rate=1e30, batch_size=4), say=said.append)
    assert len(said) == 1


def test_sgd_is_the_published_recipe(train: ImageSet) -> None:
    model, other = net(), net()
    finetune(model, train, Training(epochs=1, batch_size=24, seed=2))
    images, labels = train.tensors()
    other.train()
    order = torch.randperm(24, generator=torch.Generator().manual_seed(2000))
    optimizer = torch.optim.SGD(other.parameters(), lr=0.001, momentum=0.9)
    nn.functional.cross_entropy(other(images[order]), labels[order]).backward()
    optimizer.step()
    # the order within the only batch plays no part but in rounding
    for a, b in zip(model.parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)


def test_distillation_is_its_formula() -> None:
    generator = torch.Generator().manual_seed(0)
    y, dense = (torch.randn(5, 4, generator=generator) for _ in range(2))
    labels = torch.tensor([0, 3, 1, 1, 2])

    class Teacher(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return dense

    found = float(loss_of(y, torch.zeros(5), labels, 0.3, Teacher()))
    a, b = y.double().numpy(), dense.double().numpy()

    def softmax(v: np.ndarray) -> np.ndarray:
        e = np.exp(v)
        return e / e.sum(1, keepdims=True)

    hard = -np.log(softmax(a)[np.arange(5), labels.numpy()]).mean()
    p, q = softmax(b / 4), softmax(a / 4)
    soft = (p * np.log(p / q)).sum(1).mean()
    assert found == pytest.approx(0.7 * hard + 0.3 * 16 * soft, rel=1e-5)
    assert float(loss_of(y, torch.zeros(5), labels, 0.0, None)) == pytest.approx(hard, rel=1e-5)


@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
def test_a_killed_run_goes_on_at_the_last_epoch_bitwise(
    train: ImageSet, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, optimizer: str
) -> None:
    training = Training(epochs=3, optimizer=optimizer, batch_size=10)
    whole = finetune(net(), train, training)

    stock, calls = module._epoch, []

    def stops(*args: object) -> float:
        calls.append(args[3])
        if len(calls) == 3:
            raise KeyboardInterrupt
        return stock(*args)  # type: ignore[arg-type]

    monkeypatch.setattr(module, "_epoch", stops)
    with pytest.raises(KeyboardInterrupt):
        finetune(net(), train, training, work=tmp_path / "work")
    monkeypatch.undo()
    said: list[str] = []
    # what the second process starts from is another model: only the saved state may count
    again = finetune(net(seed=5), train, training, work=tmp_path / "work", say=said.append)
    assert said[0] == "going on after epoch 2"
    for a, b in zip(whole.state_dict().values(), again.state_dict().values(), strict=True):
        assert torch.equal(a, b)
    assert sorted(p.name for p in (tmp_path / "work").iterdir()) == ["epoch-3"]
    shutil.rmtree(tmp_path / "work")
