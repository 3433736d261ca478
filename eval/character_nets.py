"""The architectures of the pruning literature at a size that one CPU thread trains in minutes.

For images of 1 × 32 × 32; `train_digits.py` and `digits_table.py` know them by these names.

    vgg16_bn_quarter      VGG-16-BN at a quarter of its widths, 16 to 128 channels
    resnet56_half         ResNet-56 at half its width, 8 to 32 channels
    vit_small             6 blocks of 64 channels and 4 heads on patches of 4 × 4
    convnext_small        ConvNeXt of 2 + 2 + 2 blocks of 24, 48 and 96 channels on patches of 2 × 2

All train with AdamW (`ADAMW`): 625 steps of SGD leave the first two at 4 to 5 % on characters, and
ViT and ConvNeXt are trained so in their papers. 1,000 steps leave the ConvNeXt at chance there.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from moe_fair.vision.zoo import VGG, VGG16, resnet56

SIDE = 32
ADAMW = ("vgg16_bn_quarter", "resnet56_half", "vit_small", "convnext_small")


def vgg16_bn_quarter(num_classes: int, in_channels: int) -> nn.Module:
    """0.93 M parameters."""
    return VGG([w if isinstance(w, str) else w // 4 for w in VGG16], num_classes, in_channels)


def resnet56_half(num_classes: int, in_channels: int) -> nn.Module:
    """0.22 M parameters."""
    return resnet56(num_classes, in_channels, width=8)


class Attention(nn.Module):
    """Self-attention with q, k and v from one layer."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.num_heads = heads
        self.qkv, self.proj = nn.Linear(width, 3 * width), nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        s, n, _ = x.shape
        q, k, v = self.qkv(x).reshape(s, n, 3, self.num_heads, -1).permute(2, 0, 3, 1, 4)
        found = nn.functional.scaled_dot_product_attention(q, k, v)
        return self.proj(found.transpose(1, 2).reshape(s, n, -1))


def mlp(width: int, wider: int = 4) -> nn.Sequential:
    """Two layers with GELU between them."""
    return nn.Sequential(
        nn.Linear(width, wider * width), nn.GELU(), nn.Linear(wider * width, width)
    )


class ViTBlock(nn.Module):
    """Attention and MLP, each on what LayerNorm gives and added to the stream."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.attention, self.mlp = Attention(width, heads), mlp(width)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attention(self.norm1(x))
        return x + self.mlp(self.norm2(x))


class ViT(nn.Module):
    """Dosovitskiy et al., arXiv 2010.11929, with the mean of the patches in place of a token."""

    def __init__(
        self, num_classes: int, in_channels: int, width: int, depth: int, heads: int, patch: int
    ) -> None:
        super().__init__()
        self.embed = nn.Conv2d(in_channels, width, patch, patch)
        self.position = nn.Parameter(0.02 * torch.randn(1, (SIDE // patch) ** 2, width))
        self.blocks = nn.Sequential(*(ViTBlock(width, heads) for _ in range(depth)))
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, num_classes)

    def forward(self, images: Tensor) -> Tensor:
        x = self.embed(images).flatten(2).transpose(1, 2) + self.position
        return self.head(self.norm(self.blocks(x)).mean(1))


class ConvNeXtBlock(nn.Module):
    """Depthwise 7 × 7, LayerNorm and an MLP, scaled by a number a channel; the stream is added."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.depthwise = nn.Conv2d(width, width, 7, padding=3, groups=width)
        self.norm, self.mlp = nn.LayerNorm(width), mlp(width)
        self.scale = nn.Parameter(0.1 * torch.ones(width))

    def forward(self, x: Tensor) -> Tensor:
        y = self.depthwise(x).permute(0, 2, 3, 1)
        return x + (self.scale * self.mlp(self.norm(y))).permute(0, 3, 1, 2)


class ChannelNorm(nn.Module):
    """LayerNorm over the channels of a map."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)


class ConvNeXt(nn.Module):
    """Liu et al., arXiv 2201.03545."""

    def __init__(
        self, num_classes: int, in_channels: int, widths: tuple[int, ...], blocks: int
    ) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        before = in_channels
        for width in widths:
            down = nn.Conv2d(before, width, 2, 2)
            layers += [ChannelNorm(before), down] if layers else [down, ChannelNorm(width)]
            layers += [ConvNeXtBlock(width) for _ in range(blocks)]
            before = width
        self.features = nn.Sequential(*layers)
        self.norm, self.head = nn.LayerNorm(before), nn.Linear(before, num_classes)

    def forward(self, images: Tensor) -> Tensor:
        return self.head(self.norm(self.features(images).mean((2, 3))))


def vit_small(num_classes: int, in_channels: int) -> nn.Module:
    """0.31 M parameters."""
    return ViT(num_classes, in_channels, width=64, depth=6, heads=4, patch=4)


def convnext_small(num_classes: int, in_channels: int) -> nn.Module:
    """0.24 M parameters."""
    return ConvNeXt(num_classes, in_channels, widths=(24, 48, 96), blocks=2)
