"""Small image classifiers of the pruning literature, in plain PyTorch, for inputs of 32 × 32.

    vgg16_bn      Simonyan & Zisserman, arXiv 1409.1556, with batch normalisation and one classifier
                  layer, as papers run it on CIFAR
    vgg_small     the same recipe with 6 convolutions, for CPUs
    resnet20, resnet56    He et al., arXiv 1512.03385, section 4.2; projections (option B) where
                  the width changes
    densenet40    Huang et al., arXiv 1608.06993: growth 12, no bottleneck, no compression

Every function takes `num_classes`, `in_channels` and where it makes sense a `width` factor.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence

import torch
from torch import Tensor, nn

VGG16 = (64, 64, "M", 128, 128, "M", 256, 256, 256, "M", 512, 512, 512, "M", 512, 512, 512, "M")
VGG_SMALL = (32, 32, "M", 64, 64, "M", 128, 128, "M")


class VGG(nn.Module):
    """Convolutions of 3 × 3 with batch normalisation and ReLU; "M" is a max-pooling of 2 × 2."""

    def __init__(self, plan: Sequence[int | str], num_classes: int, in_channels: int) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        width = in_channels
        for item in plan:
            if isinstance(item, int):
                layers += [
                    nn.Conv2d(width, item, 3, padding=1, bias=False),
                    nn.BatchNorm2d(item),
                    nn.ReLU(),
                ]
                width = item
            else:
                layers.append(nn.MaxPool2d(2))
        self.features = nn.Sequential(*layers)
        self.pool, self.flatten = nn.AdaptiveAvgPool2d(1), nn.Flatten()
        self.classifier = nn.Linear(width, num_classes)

    def forward(self, images: Tensor) -> Tensor:
        return self.classifier(self.flatten(self.pool(self.features(images))))


class BasicBlock(nn.Module):
    """Two 3 × 3 convolutions and a shortcut, a projection where shape changes."""

    def __init__(self, in_width: int, width: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(in_width, width, 3, stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.conv2 = nn.Conv2d(width, width, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(width)
        self.shortcut: nn.Module = nn.Identity()
        if stride != 1 or in_width != width:
            self.shortcut = nn.Sequential(
                nn.Conv2d(in_width, width, 1, stride, bias=False), nn.BatchNorm2d(width)
            )

    def forward(self, x: Tensor) -> Tensor:
        y = torch.relu(self.bn1(self.conv1(x)))
        return torch.relu(self.bn2(self.conv2(y)) + self.shortcut(x))


class ResNet(nn.Module):
    """Three stages of `blocks` basic blocks; depth 6 × blocks + 2."""

    def __init__(self, blocks: int, num_classes: int, in_channels: int, width: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(in_channels, width, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        stages: list[nn.Module] = []
        before = width
        for stage in range(3):
            after = width * 2**stage
            for block in range(blocks):
                stride = 2 if stage and not block else 1
                stages.append(BasicBlock(before, after, stride))
                before = after
        self.blocks = nn.Sequential(*stages)
        self.pool, self.flatten = nn.AdaptiveAvgPool2d(1), nn.Flatten()
        self.classifier = nn.Linear(before, num_classes)

    def forward(self, images: Tensor) -> Tensor:
        x = torch.relu(self.bn1(self.conv1(images)))
        return self.classifier(self.flatten(self.pool(self.blocks(x))))


class DenseLayer(nn.Module):
    """BN, ReLU, 3 × 3 convolution to `growth` channels that are appended to the input."""

    def __init__(self, width: int, growth: int) -> None:
        super().__init__()
        self.bn = nn.BatchNorm2d(width)
        self.conv = nn.Conv2d(width, growth, 3, padding=1, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([x, self.conv(torch.relu(self.bn(x)))], dim=1)


class DenseNet(nn.Module):
    """Three dense blocks with transitions of 1 × 1 convolution and average pooling."""

    def __init__(
        self, layers: int, growth: int, num_classes: int, in_channels: int, width: int
    ) -> None:
        super().__init__()
        parts: list[tuple[str, nn.Module]] = [
            ("conv0", nn.Conv2d(in_channels, width, 3, padding=1, bias=False))
        ]
        for block in range(3):
            for layer in range(layers):
                parts.append((f"block{block}_layer{layer}", DenseLayer(width, growth)))
                width += growth
            if block < 2:
                transition = nn.Sequential(
                    nn.BatchNorm2d(width),
                    nn.ReLU(),
                    nn.Conv2d(width, width, 1, bias=False),
                    nn.AvgPool2d(2),
                )
                parts.append((f"transition{block}", transition))
        parts += [("bn", nn.BatchNorm2d(width)), ("relu", nn.ReLU())]
        self.features = nn.Sequential(OrderedDict(parts))
        self.pool, self.flatten = nn.AdaptiveAvgPool2d(1), nn.Flatten()
        self.classifier = nn.Linear(width, num_classes)

    def forward(self, images: Tensor) -> Tensor:
        return self.classifier(self.flatten(self.pool(self.features(images))))


def vgg16_bn(num_classes: int = 10, in_channels: int = 3) -> VGG:
    """VGG16 with batch normalisation, 14.7 M parameters."""
    return VGG(VGG16, num_classes, in_channels)


def vgg_small(num_classes: int = 10, in_channels: int = 1) -> VGG:
    """Six convolutions, 0.29 M parameters."""
    return VGG(VGG_SMALL, num_classes, in_channels)


def resnet20(num_classes: int = 10, in_channels: int = 3, width: int = 16) -> ResNet:
    """ResNet-20, 0.27 M parameters at width 16."""
    return ResNet(3, num_classes, in_channels, width)


def resnet56(num_classes: int = 10, in_channels: int = 3, width: int = 16) -> ResNet:
    """ResNet-56, 0.86 M parameters at width 16."""
    return ResNet(9, num_classes, in_channels, width)


def densenet40(
    num_classes: int = 10, in_channels: int = 3, growth: int = 12, layers: int = 12
) -> DenseNet:
    """DenseNet-40 (growth 12), 1.0 M parameters; `layers` in each of the three blocks."""
    return DenseNet(layers, growth, num_classes, in_channels, 2 * 8)
