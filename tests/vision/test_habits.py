"""What people do in models of their own: it is pruned, or refused in a line that says why."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from vision.architectures import images, small
from vision.test_vision_flow import settings

from moe_fair.pipelines import vision as pipeline
from moe_fair.vision.finetune import Training, make_optimizer
from moe_fair.vision.graph import CHOSEN, logits
from moe_fair.vision.inputs import classes_of
from moe_fair.vision.load import build, first_channels, load_weights
from moe_fair.vision.proof import find_groups, uneven_plan
from moe_fair.vision.source import open_source
from moe_fair.vision.surgery import cut, cuts_of
from moe_fair.vision.trace import copied

HERE = "vision.test_habits"


def names(model: nn.Module) -> list[str]:
    return [g.name for g in find_groups(model.eval(), images(2)).groups]


def made(function: str) -> nn.Module:
    base = {"kind": "function", "module": HERE, "function": function, "arguments": [],
            "keywords": {}}  # fmt: skip
    return build(base, trusted=True)


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.a, self.b, self.head = nn.Conv2d(3, 8, 3), nn.Conv2d(8, 6, 3), nn.Linear(6, 3)

    def features(self, x: Tensor) -> Tensor:
        return self.b(self.a(x).relu()).relu()

    def forward(self, x: Tensor) -> Any:
        return self.head(self.features(x).mean((2, 3)))


class Decoder(Net):
    """The features lead to something beside the logits, too."""

    def __init__(self) -> None:
        super().__init__()
        self.up = nn.ConvTranspose2d(6, 3, 3)

    def forward(self, x: Tensor) -> Any:
        f = self.features(x)
        return {"image": self.up(f), "more": [f], "logits": self.head(f.mean((2, 3)))}


def test_layers_behind_another_output_follow() -> None:
    net = Decoder().eval()
    graph = find_groups(net, images(2))
    assert [g.name for g in graph.groups] == ["a", "b"]
    pruned = copy.deepcopy(net)
    cut(pruned, cuts_of(graph.groups, uneven_plan(graph.groups)))
    assert pruned.up.in_channels < 6  # type: ignore[operator]
    pruned(images(2))


class MoreInTraining(Net):
    """A projection whose layers no evaluation runs, in a tuple that does not name the logits."""

    def __init__(self) -> None:
        super().__init__()
        self.projection = nn.Linear(6, 4)

    def forward(self, x: Tensor) -> Any:
        f = self.features(x).mean((2, 3))
        return (self.projection(f), self.head(f)) if self.training else self.head(f)


def test_what_feeds_a_head_for_training_stays_whole() -> None:
    graph = find_groups(MoreInTraining().eval(), images(2))
    assert [g.name for g in graph.groups] == ["a"]
    assert "does not run in training" in graph.whole["b"]


def test_a_size_that_changes_the_model_is_not_looked_at() -> None:
    import transformers

    torch.manual_seed(0)
    config = transformers.SwinConfig(
        embed_dim=16, depths=[2, 1, 1], num_heads=[1, 2, 4], image_size=64, window_size=4
    )
    net = transformers.SwinForImageClassification(config).eval()
    found = [g.name for g in find_groups(net, torch.rand(2, 3, 64, 64)).groups]
    assert len(found) == 4
    assert all(name.endswith("mlp.fc1") for name in found)


class NoGradients(Net):
    def features(self, x: Tensor) -> Tensor:
        with torch.no_grad():
            x = self.a(x)
        return self.b(x)


def test_layers_without_gradients_are_named() -> None:
    graph = find_groups(NoGradients().eval(), images(2))
    assert [g.name for g in graph.groups] == ["b"]
    assert "torch.no_grad or detach" in graph.whole["a"]


class Keeps(Net):
    """Features of the last call, at any depth."""

    def features(self, x: Tensor) -> Tensor:
        self.last = self.a(x)
        self.kept = [{"deep": (self.last * 2, [self.last * 3])}, self.last]
        self.kept.append(self.kept)  # type: ignore[arg-type]
        return self.b(self.last.relu()).relu()


def test_what_is_kept_of_a_call_is_no_obstacle() -> None:
    net = Keeps().eval()
    net(images(2))
    assert names(net) == ["a", "b"]
    torch.testing.assert_close(copied(net)(images(2)), net(images(2)))


class Squeezes(Net):
    def forward(self, x: Tensor) -> Any:
        return self.head(nn.functional.adaptive_avg_pool2d(self.features(x), 1).squeeze())


def test_one_image_that_was_squeezed_is_a_row() -> None:
    net = Squeezes().eval()
    assert logits(net, images(1)).shape == (1, 3)
    assert logits(net, images(2)).shape == (2, 3)


class Draws(Net):
    def forward(self, x: Tensor) -> Any:
        return nn.functional.dropout(super().forward(x), 0.5)


class Segments(Net):
    def forward(self, x: Tensor) -> Any:
        return self.features(x)


class TwoImages(Net):
    def forward(self, x: Tensor) -> Any:
        return self.head(self.features(x).view(2, 6, -1).mean(-1))


class TwoInputs(Net):
    def forward(self, x: Tensor, y: Tensor) -> Any:  # type: ignore[override]
        return super().forward(x) + y


def draws() -> nn.Module:
    return Draws()


def segments() -> nn.Module:
    return Segments()


def two_images() -> nn.Module:
    return TwoImages()


def two_inputs() -> nn.Module:
    return TwoInputs()


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("draws", "gives other outputs each time it sees the same images"),
        ("segments", "what is pruned here are classifiers"),
        ("two_images", "does not run on one image"),
        ("two_inputs", "does not run on images, 2 × 3 × 16 × 16: TypeError.*argument: 'y'"),
        ("exported", "gives an exported program"),
    ],
)
def test_refused_in_a_line(pictures: Path, tmp_path: Path, name: str, said: str) -> None:
    with pytest.raises(ValueError, match=said):
        pipeline.prune(settings(pictures, model=f"{HERE}:{name}"), tmp_path / "out")


def exported() -> nn.Module:
    net = nn.Sequential(nn.Conv2d(3, 4, 1), nn.Flatten()).eval()
    return torch.export.export(net, (torch.zeros(2, 3, 8, 8),)).module()


def parallel() -> nn.Module:
    return nn.DataParallel(small())


def half() -> nn.Module:
    return small().bfloat16()


def test_wrapped_and_half_precision_models_are_plain_ones(tmp_path: Path) -> None:
    model = made("parallel")
    assert not isinstance(model, nn.DataParallel)
    file = tmp_path / "weights.safetensors"
    save_file({f"module.{n}": t + 1 for n, t in model.state_dict().items()}, file)
    load_weights(model, file)
    assert torch.equal(model.classifier.bias, load_file(file)["module.classifier.bias"])  # type: ignore[union-attr]
    assert {p.dtype for p in made("half").parameters()} == {torch.float32}


@pytest.mark.parametrize("channels", [1, 3])
def test_channels_of_a_net_without_convolutions(channels: int) -> None:
    net = nn.Sequential(nn.Flatten(), nn.Linear(channels * 64, 12), nn.ReLU(), nn.Linear(12, 3))
    assert first_channels(net, 8) == channels
    assert classes_of(net, torch.rand(2, channels, 8, 8)) == 3


def test_a_first_convolution_that_sees_no_image() -> None:
    """As of a net on a picture's discrete cosine transform."""
    assert first_channels(nn.Sequential(nn.PixelUnshuffle(8), nn.Conv2d(192, 8, 1)), 32) == 3


def test_a_hub_model_that_names_no_classes(tmp_path: Path) -> None:
    import transformers

    config = transformers.PvtConfig(
        hidden_sizes=[8, 16], depths=[1, 1], num_attention_heads=[1, 2], num_encoder_blocks=2,
        sequence_reduction_ratios=[2, 1], mlp_ratios=[2, 2], patch_sizes=[4, 2], strides=[4, 2],
        image_size=32,
    )  # fmt: skip
    config.num_labels, config.id2label = 4, None
    transformers.PvtForImageClassification(config).save_pretrained(tmp_path)
    assert open_source(str(tmp_path), image_size=32).labels is None


def test_nothing_to_train_is_said() -> None:
    frozen = small().requires_grad_(False)
    with pytest.raises(ValueError, match="all parameters are frozen"):
        make_optimizer(frozen, Training(epochs=1))


def test_logits_by_number_are_looked_for_in_a_tensor() -> None:
    net = Net()
    setattr(net, CHOSEN, "0")
    with pytest.raises(ValueError, match="the model gives a Tensor without parts"):
        logits(net, images(2))
