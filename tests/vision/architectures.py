"""The architectures that pruning is proven on, with random weights, for images of 32 × 32.

Widths are divided so that a test takes a second; depths, strides, shortcuts and couplings are those
of the published models.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from moe_fair.vision import zoo

CLASSES = 10
SMALL_VIT = {
    "hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 4, "intermediate_size": 64,
    "image_size": 32, "patch_size": 8,
}  # fmt: skip


def _hf(name: str, **config: Any) -> Callable[[], nn.Module]:
    def make() -> nn.Module:
        import transformers

        made = getattr(transformers, f"{name}Config")(num_labels=CLASSES, **config)
        model: nn.Module = getattr(transformers, f"{name}ForImageClassification")(made)
        return model

    return make


ARCHITECTURES: dict[str, Callable[[], nn.Module]] = {
    "vgg16_bn": lambda: zoo.VGG(
        [w if isinstance(w, str) else w // 8 for w in zoo.VGG16], CLASSES, 3
    ),
    "resnet20": lambda: zoo.resnet20(width=8),
    "resnet56": lambda: zoo.resnet56(width=8),
    "densenet40": lambda: zoo.densenet40(growth=4),
    "resnet18": _hf(
        "ResNet", layer_type="basic", embedding_size=8, hidden_sizes=[8, 16, 32, 64],
        depths=[2, 2, 2, 2],
    ),
    "resnet50": _hf(
        "ResNet", layer_type="bottleneck", embedding_size=8, hidden_sizes=[16, 32, 64, 128],
        depths=[3, 4, 6, 3],
    ),
    "convnext": _hf("ConvNext", depths=[1, 1, 3, 1], hidden_sizes=[8, 16, 24, 32]),
    "vit": _hf("ViT", **SMALL_VIT),
    "deit": _hf("DeiT", **SMALL_VIT),
    "mobilenet_v2": _hf("MobileNetV2", image_size=32, depth_multiplier=0.5),
    "regnet_x": _hf(
        "RegNet", layer_type="x", embedding_size=8, hidden_sizes=[16, 32, 48, 64],
        depths=[1, 2, 3, 1], groups_width=8,
    ),
    "regnet_y": _hf(
        "RegNet", layer_type="y", embedding_size=8, hidden_sizes=[16, 32, 48, 64],
        depths=[1, 2, 3, 1], groups_width=8,
    ),
}  # fmt: skip


def small() -> nn.Module:
    """A net for three classes that costs next to nothing, with one shortcut."""
    net = zoo.ResNet(1, 3, 3, 4)
    net.blocks = net.blocks[:2]
    net.classifier = nn.Linear(8, 3)
    return net


def strange() -> nn.Module:
    """A net whose first layer has a name of markup, an unfinished formula and a control."""
    return nn.Sequential(
        OrderedDict(
            {
                "a$\\frac{<b>\x1b[31m": nn.Conv2d(3, 6, 3),
                "relu": nn.ReLU(),
                "pool": nn.AdaptiveAvgPool2d(1),
                "flatten": nn.Flatten(),
                "classifier": nn.Linear(6, 3),
            }
        )
    )


def built(name: str) -> nn.Module:
    """A model with the library's own random weights."""
    return ARCHITECTURES[name]()


def lively(name: str, seed: int = 0) -> nn.Module:
    """A model that reacts to its images and whose normalisations look like trained ones.

    Fresh ones map 0 to 0, or scale a branch by 1e-6 (LayerScale), and transformers' weights are so
    small that a stream hardly notices its branches: a wrong cut would not show.
    """
    torch.manual_seed(seed)
    model = built(name).eval()
    generator = torch.Generator().manual_seed(seed)

    def fill(t: torch.Tensor, low: float, high: float) -> None:
        t.copy_(low + (high - low) * torch.rand(t.shape, generator=generator))

    with torch.no_grad():
        for n, t in [*model.named_parameters(), *model.named_buffers()]:
            if "running_mean" in n or (t.dim() == 1 and n.endswith("bias")):
                fill(t, -0.3, 0.3)
            elif "running_var" in n or (t.dim() == 1 and t.is_floating_point()):
                fill(t, 0.5, 1.5)
            elif t.dim() > 1:
                nn.init.kaiming_normal_(t, generator=generator)
    return model


def images(count: int = 4, seed: int = 1, channels: int = 3) -> torch.Tensor:
    """[count, channels, 32, 32] noise."""
    return torch.randn(count, channels, 32, 32, generator=torch.Generator().manual_seed(seed))
