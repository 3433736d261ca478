"""Nets as people write them by hand, small and with random weights, for `vision_nets.py`.

Each takes images of 3 × 32 × 32 (LeNet 1 × 32 × 32) and says something about ten classes; what is
unusual about it is in its name or its first line.
"""

from __future__ import annotations

import functools
from collections import OrderedDict
from typing import Any

import torch
import torch.nn.functional as F
import torch.utils.checkpoint
from torch import Tensor, nn

CLASSES = 10


def conv(i: int, o: int, k: int = 3, stride: int = 1, groups: int = 1) -> nn.Sequential:
    """Convolution, normalisation, ReLU."""
    layer = nn.Conv2d(i, o, k, stride, k // 2, groups=groups, bias=False)
    return nn.Sequential(layer, nn.BatchNorm2d(o), nn.ReLU(inplace=True))


class UNet(nn.Module):
    """Encoder, decoder with transposed convolutions and skips that are concatenated."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = conv(3, 8), conv(8, 16), conv(16, 32)
        self.up1, self.d1 = nn.ConvTranspose2d(32, 16, 2, 2), conv(32, 16)
        self.up2, self.d2 = nn.ConvTranspose2d(16, 8, 2, 2), conv(16, 8)
        self.out = nn.Conv2d(8, CLASSES, 1)

    def dense(self, x: Tensor) -> Tensor:
        a = self.a(x)
        b = self.b(F.max_pool2d(a, 2))
        c = self.c(F.max_pool2d(b, 2))
        d = self.d1(torch.cat([self.up1(c), b], 1))
        return self.out(self.d2(torch.cat([self.up2(d), a], 1)))

    def forward(self, x: Tensor) -> Tensor:
        return self.dense(x).mean((2, 3))


class Segmenter(UNet):
    """Gives a class for every pixel."""

    def forward(self, x: Tensor) -> Tensor:
        return self.dense(x)


class Autoencoder(nn.Module):
    """(image, logits): say which."""

    def __init__(self) -> None:
        super().__init__()
        self.enc = nn.Sequential(conv(3, 8, stride=2), conv(8, 16, stride=2))
        self.dec = nn.Sequential(
            nn.ConvTranspose2d(16, 8, 4, 2, 1), nn.ReLU(), nn.ConvTranspose2d(8, 3, 4, 2, 1)
        )
        self.head = nn.Linear(16, CLASSES)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        z = self.enc(x)
        return self.dec(z), self.head(z.mean((2, 3)))


class DictOfTwo(Autoencoder):
    def forward(self, x: Tensor) -> Any:
        image, out = super().forward(x)
        return {"image": image, "logits": out}


class SuperResolution(nn.Module):
    """Two pixel shuffles before the head."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(conv(3, 16), conv(16, 16))
        self.up = nn.Sequential(nn.Conv2d(16, 32, 3, padding=1), nn.PixelShuffle(2), nn.PReLU(8))
        self.tail = nn.Conv2d(8, 4, 3, padding=1)
        self.head = nn.Linear(16, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        y = self.tail(self.up(self.body(x)))
        return self.head(F.pixel_unshuffle(y, 2).mean((2, 3)))


class Siamese(nn.Module):
    """One branch for the two halves of an image."""

    def __init__(self) -> None:
        super().__init__()
        self.branch = nn.Sequential(conv(3, 8), conv(8, 16, stride=2))
        self.fc, self.head = nn.Linear(16, 12), nn.Linear(12, CLASSES)

    def once(self, x: Tensor) -> Tensor:
        return self.fc(self.branch(x).mean((2, 3)))

    def forward(self, x: Tensor) -> Tensor:
        a, b = x.chunk(2, -1)
        return self.head((self.once(a) - self.once(b)).abs())


class Discriminator(nn.Module):
    """Spectral norm on every layer."""

    def __init__(self, old: bool = False) -> None:
        super().__init__()
        norm = nn.utils.spectral_norm if old else nn.utils.parametrizations.spectral_norm
        self.net = nn.Sequential(
            norm(nn.Conv2d(3, 8, 4, 2, 1)), nn.LeakyReLU(0.2),
            norm(nn.Conv2d(8, 16, 4, 2, 1)), nn.LeakyReLU(0.2),
            nn.Conv2d(16, 16, 3), nn.LeakyReLU(0.2), nn.Conv2d(16, 16, 3), nn.LeakyReLU(0.2),
        )  # fmt: skip
        self.head = norm(nn.Linear(16, CLASSES))

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.net(x).sum((2, 3)))


class CRNN(nn.Module):
    """An LSTM over the columns of the features."""

    def __init__(self) -> None:
        super().__init__()
        self.cnn = nn.Sequential(conv(3, 8, stride=2), conv(8, 16, stride=2), conv(16, 8))
        self.lstm = nn.LSTM(8 * 8, 12, batch_first=True, bidirectional=True)
        self.head = nn.Linear(24, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        f = self.cnn(x)
        out, _ = self.lstm(f.permute(0, 3, 1, 2).flatten(2))
        return self.head(out[:, -1])


class GruHead(nn.Module):
    """The vector of an image given to a GRUCell four times."""

    def __init__(self) -> None:
        super().__init__()
        self.cnn = nn.Sequential(conv(3, 8, stride=2), conv(8, 16, stride=2))
        self.cell, self.head = nn.GRUCell(16, 16), nn.Linear(16, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        f = self.cnn(x).mean((2, 3))
        h = torch.zeros_like(f)
        for _ in range(4):
            h = self.cell(f, h)
        return self.head(h)


class Lambda(nn.Module):
    def __init__(self, f: Any) -> None:
        super().__init__()
        self.f = f

    def forward(self, x: Tensor) -> Tensor:
        return self.f(x)


def lambdas() -> nn.Module:
    """Lambda modules, as ResNets for CIFAR have them (option A shortcuts)."""
    pad = Lambda(lambda x: F.pad(x[:, :, ::2, ::2], (0, 0, 0, 0, 4, 4)))
    return nn.Sequential(
        conv(3, 8), pad, conv(16, 16), Lambda(lambda x: x.mean((2, 3))), nn.Linear(16, CLASSES)
    )


class OptionA(nn.Module):
    """A shortcut of a ResNet for CIFAR that is padded with zeros."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.a, self.b = conv(3, 8), conv(8, 16, stride=2), conv(16, 16)
        self.c, self.head = conv(16, 16), nn.Linear(16, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        x = self.b(self.a(x)) + F.pad(x[:, :, ::2, ::2], (0, 0, 0, 0, 4, 4))
        return self.head(self.c(x).mean((2, 3)))


class Recurrent(nn.Module):
    """One block run three times (shared weights)."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.block = conv(3, 16), nn.Sequential(conv(16, 24), conv(24, 16))
        self.head = nn.Linear(16, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        for _ in range(3):
            x = x + self.block(x)
        return self.head(x.mean((2, 3)))


class Einsum(nn.Module):
    """Attention by einsum with heads that a reshape makes."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 16, 8, 8)
        self.q, self.k, self.v = (nn.Linear(16, 16) for _ in range(3))
        self.o, self.m1, self.m2 = nn.Linear(16, 16), nn.Linear(16, 32), nn.Linear(32, 16)
        self.head = nn.Linear(16, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x).flatten(2).transpose(1, 2)
        q, k, v = (f(x).unflatten(-1, (4, 4)) for f in (self.q, self.k, self.v))
        a = torch.einsum("bthd,bshd->bhts", q, k).softmax(-1)
        x = x + self.o(torch.einsum("bhts,bshd->bthd", a, v).flatten(2))
        return self.head((x + self.m2(F.gelu(self.m1(x)))).mean(1))


class Attention(nn.Module):
    """nn.MultiheadAttention and nn.TransformerEncoderLayer."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.pos = nn.Conv2d(3, 16, 8, 8), nn.Parameter(torch.randn(1, 16, 16))
        self.attention = nn.MultiheadAttention(16, 4, batch_first=True)
        self.layer = nn.TransformerEncoderLayer(16, 4, 32, batch_first=True)
        self.head = nn.Linear(16, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x).flatten(2).transpose(1, 2) + self.pos
        x = x + self.attention(x, x, x, need_weights=False)[0]
        return self.head(self.layer(x).mean(1))


class Checkpointed(nn.Module):
    """Blocks under torch.utils.checkpoint."""

    def __init__(self, reentrant: bool = False) -> None:
        super().__init__()
        self.stem, self.reentrant = conv(3, 8), reentrant
        self.blocks = nn.ModuleList(nn.Sequential(conv(8, 16), conv(16, 8)) for _ in range(2))
        self.head = nn.Linear(8, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        for b in self.blocks:
            x = x + torch.utils.checkpoint.checkpoint(b, x, use_reentrant=self.reentrant)
        return self.head(x.mean((2, 3)))


class Blur(nn.Module):
    """A buffer with a kernel for every channel, made when the net is."""

    def __init__(self, persistent: bool = True) -> None:
        super().__init__()
        self.a, self.b, self.c = conv(3, 8), conv(8, 16), conv(16, 16)
        k = torch.tensor([1.0, 2.0, 1.0])
        kernel = (k[:, None] * k / 16).expand(8, 1, 3, 3).clone()
        self.register_buffer("kernel", kernel, persistent=persistent)
        self.head = nn.Linear(16, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        x = F.conv2d(self.a(x), self.kernel, stride=2, padding=1, groups=self.kernel.shape[0])
        return self.head(self.c(self.b(x)).mean((2, 3)))


class Lists(nn.Module):
    """Weights in a ParameterList and a ParameterDict."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = conv(3, 8), conv(8, 8), conv(8, 16)
        self.scales = nn.ParameterList([torch.ones(8, 1, 1), torch.ones(1)])
        self.more = nn.ParameterDict({"shift": nn.Parameter(torch.zeros(1, 16, 1, 1))})
        self.d, self.head = conv(16, 16), nn.Linear(16, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        x = self.b(self.a(x) * self.scales[0]) * self.scales[1]
        return self.head(self.d(self.c(x) + self.more["shift"]).mean((2, 3)))


class InPlace(nn.Module):
    """Channels that are written over, `+=` and `clamp_`."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c, self.d = conv(3, 8), conv(8, 8), conv(8, 12), conv(12, 12)
        self.head = nn.Linear(12, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        x = self.a(x)
        y = self.b(x)
        y += x
        y[:, :4] = 0.5 * y[:, :4]
        y = self.d(self.c(y).clamp_(max=6))
        y.mul_(2)
        return self.head(y.mean((2, 3)))


class CBAM(nn.Module):
    """Channel attention, then spatial attention over means and maxima of the channels."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = conv(3, 16), conv(16, 16), conv(16, 16)
        self.mlp = nn.Sequential(nn.Linear(16, 4), nn.ReLU(), nn.Linear(4, 16))
        self.spatial, self.head = nn.Conv2d(2, 1, 7, padding=3), nn.Linear(16, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        x = self.b(self.a(x))
        gate = self.mlp(x.mean((2, 3))) + self.mlp(x.amax((2, 3)))
        x = x * gate.sigmoid()[:, :, None, None]
        s = torch.stack([x.mean(1), x.amax(1)], 1)
        return self.head(self.c(x * self.spatial(s).sigmoid()).mean((2, 3)))


class Maxout(nn.Module):
    """The larger of two neighbouring channels."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = conv(3, 16), conv(8, 16), conv(16, 16)
        self.head = nn.Linear(16, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        x = self.a(x)
        x = x.view(x.shape[0], -1, 2, *x.shape[2:]).amax(2)
        return self.head(self.c(self.b(x)).mean((2, 3)))


class CReLU(nn.Module):
    """Features beside their negatives."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Conv2d(3, 8, 3), nn.Conv2d(16, 8, 3)
        self.head = nn.Linear(16, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        for layer in (self.a, self.b):
            x = layer(x)
            x = F.relu(torch.cat([x, -x], 1))
        return self.head(x.mean((2, 3)))


class StandardisedConv(nn.Conv2d):
    """Weights over all inputs are standardised."""

    def forward(self, x: Tensor) -> Tensor:
        w = self.weight
        w = (w - w.mean((1, 2, 3), keepdim=True)) / (w.std((1, 2, 3), keepdim=True) + 1e-5)
        return F.conv2d(x, w, self.bias, self.stride, self.padding, self.dilation, self.groups)


class BinaryConv(nn.Conv2d):
    """Signs of weights times their mean size, as XNOR-Net."""

    def forward(self, x: Tensor) -> Tensor:
        size = self.weight.abs().mean((1, 2, 3), keepdim=True)
        w = (self.weight.sign() * size - self.weight).detach() + self.weight
        return F.conv2d(x, w, self.bias, self.stride, self.padding)


def own_convolutions(kind: str = "standardised") -> nn.Module:
    """Subclasses of nn.Conv2d that compute their weights."""
    layer = {"standardised": StandardisedConv, "binary": BinaryConv}[kind]
    return nn.Sequential(
        conv(3, 8), layer(8, 16, 3), nn.ReLU(), conv(16, 16), layer(16, 16, 3), nn.ReLU(),
        conv(16, 16), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(16, CLASSES),
    )  # fmt: skip


class Frozen(nn.Module):
    """A backbone without gradients, and a head that is trained."""

    def __init__(self) -> None:
        super().__init__()
        self.backbone = nn.Sequential(conv(3, 8), conv(8, 16))
        self.neck, self.head = conv(16, 16), nn.Linear(16, CLASSES)
        self.backbone.requires_grad_(False)

    def forward(self, x: Tensor) -> Tensor:
        with torch.no_grad():
            x = self.backbone(x)
        return self.head(self.neck(x).mean((2, 3)))


class AllDetached(nn.Module):
    """Nothing before the head has a gradient."""

    def __init__(self) -> None:
        super().__init__()
        self.backbone, self.head = nn.Sequential(conv(3, 8), conv(8, 16)), nn.Linear(16, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.backbone(x).mean((2, 3)).detach())


class EarlyExits(nn.Module):
    """A list of logits, one for every exit."""

    def __init__(self) -> None:
        super().__init__()
        self.stages = nn.ModuleList([conv(3, 8), conv(8, 16, stride=2), conv(16, 16, stride=2)])
        self.exits = nn.ModuleList(nn.Linear(w, CLASSES) for w in (8, 16, 16))

    def forward(self, x: Tensor) -> list[Tensor]:
        out = []
        for stage, leave in zip(self.stages, self.exits, strict=True):
            x = stage(x)
            out.append(leave(x.mean((2, 3))))
        return out


class Pyramid(nn.Module):
    """Spatial pyramid pooling, then a flat layer."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = conv(3, 8), conv(8, 12)
        self.fc, self.head = nn.Linear(12 * 21, 32), nn.Linear(32, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        x = self.b(self.a(x))
        x = torch.cat([F.adaptive_max_pool2d(x, k).flatten(1) for k in (1, 2, 4)], 1)
        return self.head(self.fc(x).relu())


class FPN(nn.Module):
    """Top-down path by interpolation, and a head that is shared over the levels."""

    def __init__(self) -> None:
        super().__init__()
        self.c = nn.ModuleList([conv(3, 8), conv(8, 16, stride=2), conv(16, 32, stride=2)])
        self.lateral = nn.ModuleList(nn.Conv2d(w, 16, 1) for w in (8, 16, 32))
        self.smooth, self.head = conv(16, 16), nn.Conv2d(16, CLASSES, 1)

    def forward(self, x: Tensor) -> Tensor:
        levels = []
        for stage, lateral in zip(self.c, self.lateral, strict=True):
            x = stage(x)
            levels.append(lateral(x))
        top = levels.pop()
        out = [self.head(self.smooth(top)).mean((2, 3))]
        while levels:
            low = levels.pop()
            top = low + F.interpolate(top, size=low.shape[-2:], mode="nearest")
            out.append(self.head(self.smooth(top)).mean((2, 3)))
        return torch.stack(out).mean(0)


class ASPP(nn.Module):
    """Dilated branches and a pooled one, concatenated."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = conv(3, 16)
        self.branches = nn.ModuleList(nn.Conv2d(16, 8, 3, padding=d, dilation=d) for d in (1, 2, 4))
        self.pooled = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Conv2d(16, 8, 1), nn.ReLU())
        self.project, self.head = conv(32, 16, 1), nn.Linear(16, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        wide = F.interpolate(self.pooled(x), size=x.shape[-2:], mode="bilinear")
        x = torch.cat([*(b(x).relu() for b in self.branches), wide], 1)
        return self.head(self.project(x).mean((2, 3)))


class Dynamic(nn.Module):
    """A kernel mixed for every image out of four (CondConv)."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.route = conv(3, 8), nn.Linear(8, 4)
        self.experts, self.b = nn.Parameter(torch.randn(4, 16, 8, 3, 3) * 0.1), conv(16, 16)
        self.head = nn.Linear(16, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        x = self.a(x)
        mix = self.route(x.mean((2, 3))).softmax(-1)
        w = torch.einsum("be,eoikl->boikl", mix, self.experts).flatten(0, 1)
        y = F.conv2d(x.flatten(0, 1)[None], w, padding=1, groups=x.shape[0])
        return self.head(self.b(y.unflatten(1, (x.shape[0], -1))[0]).mean((2, 3)))


class Fourier(nn.Module):
    """A learnt filter in the Fourier domain, with complex numbers (GFNet)."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.filter = nn.Conv2d(3, 16, 4, 4), nn.Parameter(torch.randn(8, 5, 16, 2))
        self.m1, self.m2 = nn.Linear(16, 32), nn.Linear(32, 16)
        self.norm, self.head = nn.LayerNorm(16), nn.Linear(16, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x).permute(0, 2, 3, 1)
        f = torch.fft.rfft2(x, dim=(1, 2), norm="ortho") * torch.view_as_complex(self.filter)
        x = x + torch.fft.irfft2(f, s=(8, 8), dim=(1, 2), norm="ortho")
        x = x + self.m2(F.gelu(self.m1(self.norm(x))))
        return self.head(x.mean((1, 2)))


class OddNorms(nn.Module):
    """Normalisations without parameters or without running statistics, and of one's own."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.n1 = nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8, affine=False)
        self.b, self.n2 = nn.Conv2d(8, 8, 3), nn.BatchNorm2d(8, track_running_stats=False)
        self.c, self.n3 = nn.Conv2d(8, 8, 3), nn.LocalResponseNorm(3)
        self.d, self.head = nn.Conv2d(8, 8, 3), nn.Linear(8, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        x = self.n2(self.b(self.n1(self.a(x)).relu())).relu()
        x = F.normalize(self.d(self.n3(self.c(x))).mean((2, 3)), dim=1)
        return self.head(x)


class FrozenBatchNorm(nn.Module):
    """Statistics in buffers, as detection's backbones have them."""

    def __init__(self, width: int) -> None:
        super().__init__()
        for name, value in (("weight", 1.0), ("bias", 0.0), ("mean", 0.0), ("var", 1.0)):
            self.register_buffer(name, torch.full((width,), value))

    def forward(self, x: Tensor) -> Tensor:
        scale = self.weight * (self.var + 1e-5).rsqrt()
        return x * scale[:, None, None] + (self.bias - self.mean * scale)[:, None, None]


def frozen_norms() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(3, 8, 3), FrozenBatchNorm(8), nn.ReLU(), nn.Conv2d(8, 16, 3), nn.ReLU(),
        nn.Conv2d(16, 16, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(16, CLASSES),
    )  # fmt: skip


class Unregistered(nn.Module):
    """Layers in a plain list: no state has them."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = [nn.Conv2d(3, 8, 3), nn.Conv2d(8, 8, 3)]
        self.neck, self.head = nn.Conv2d(8, 8, 3), nn.Linear(8, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = layer(x).relu()
        return self.head(self.neck(x).relu().mean((2, 3)))


class Keywords(nn.Module):
    """Layers called by keyword."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = nn.Conv2d(3, 8, 3), nn.Conv2d(8, 8, 3), nn.Conv2d(8, 8, 3)
        self.head = nn.Linear(8, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(input=self.a(input=x))
        return self.head(input=self.c(self.b(input=x).relu()).mean(dim=(2, 3)))


class Remembers(nn.Module):
    """Keeps features of its last call, by itself and by a hook."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.head = conv(3, 8), conv(8, 16), nn.Linear(16, CLASSES)
        self.seen: dict[str, Any] = {}
        self.b.register_forward_hook(functools.partial(self.keep, "b"))

    def keep(self, name: str, module: nn.Module, inputs: Any, out: Tensor) -> None:
        self.seen[name] = out

    def forward(self, x: Tensor) -> Tensor:
        self.last = self.a(x)
        self.pair = [self.last, {"deep": self.last * 2}]
        return self.head(self.b(self.last).mean((2, 3)))


class Noisy(nn.Module):
    """Draws in evaluation too (Monte Carlo dropout)."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.head = conv(3, 8), conv(8, 16), nn.Linear(16, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        x = F.dropout(self.b(self.a(x)), 0.2, training=True)
        return self.head(x.mean((2, 3)))


class Branches(nn.Module):
    """Control flow that looks at values."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = conv(3, 8), conv(8, 16), conv(8, 16)
        self.head = nn.Linear(16, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        x = self.a(x)
        x = self.b(x) if x.sum().item() > 0 else self.c(x)
        return self.head(x.mean((2, 3)))


class LeNet(nn.Module):
    """Grey images and a flat layer, as in every first lesson."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.conv2 = nn.Conv2d(1, 6, 5), nn.Conv2d(6, 16, 5)
        self.fc1, self.fc2, self.fc3 = nn.Linear(400, 120), nn.Linear(120, 84), nn.Linear(84, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = F.max_pool2d(F.relu(self.conv1(x)), (2, 2))
        x = F.max_pool2d(F.relu(self.conv2(x)), 2)
        x = x.view(-1, self.num_flat_features(x))
        return F.log_softmax(self.fc3(F.relu(self.fc2(F.relu(self.fc1(x))))), dim=1)

    def num_flat_features(self, x: Tensor) -> int:
        size = 1
        for s in x.size()[1:]:
            size *= s
        return size


class Fixed(nn.Module):
    """A view with a batch that is written down."""

    def __init__(self, batch: int = 2) -> None:
        super().__init__()
        self.a, self.fc, self.batch = conv(3, 8, stride=4), nn.Linear(512, CLASSES), batch

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.a(x).view(self.batch, 512))


class Hyper(nn.Module):
    """One net makes the weights of another."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.z = conv(3, 8), nn.Parameter(torch.randn(4))
        self.make, self.b = nn.Linear(4, 16 * 8 * 9), conv(16, 16)
        self.head = nn.Linear(16, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        w = self.make(self.z).view(16, 8, 3, 3)
        return self.head(self.b(F.conv2d(self.a(x), w)).mean((2, 3)))


class Coupling(nn.Module):
    """Reversible blocks on two halves of the channels."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.f, self.g = conv(3, 16), conv(8, 8), conv(8, 8)
        self.tail, self.head = conv(16, 24), nn.Linear(24, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        a, b = self.stem(x).chunk(2, 1)
        a = a + self.f(b)
        b = b + self.g(a)
        return self.head(self.tail(torch.cat([a, b], 1)).mean((2, 3)))


class Swish(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return x * x.sigmoid()

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Tensor:
        s = ctx.saved_tensors[0].sigmoid()
        return g * s * (1 + ctx.saved_tensors[0] * (1 - s))


class OwnFunction(nn.Module):
    """An activation that is a torch.autograd.Function, as EfficientNets have it."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = conv(3, 8), nn.Conv2d(8, 16, 3), conv(16, 16)
        self.head = nn.Linear(16, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.c(Swish.apply(self.b(self.a(x)))).mean((2, 3)))


class ByChannel(nn.Module):
    """PReLU with a slope for every channel, and dropout of channels."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.p1 = nn.Conv2d(3, 8, 3), nn.PReLU(8)
        self.b, self.p2 = nn.Conv2d(8, 16, 3), nn.PReLU(16)
        self.drop, self.fc = nn.Dropout2d(0.1), nn.Linear(16, 16)
        self.p3, self.head = nn.PReLU(16), nn.Linear(16, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        x = self.drop(self.p2(self.b(self.p1(self.a(x)))))
        return self.head(self.p3(self.fc(x.mean((2, 3)))))


class Depthwise(nn.Module):
    """Depthwise with a multiplier of two, shuffles by hand, a grouped transposed convolution."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.dw = conv(3, 8), nn.Conv2d(8, 16, 3, groups=8)
        self.b, self.up = conv(16, 16, groups=4), nn.ConvTranspose2d(16, 16, 2, 2, groups=4)
        self.c, self.head = conv(16, 16), nn.Linear(16, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        x = self.b(self.dw(self.a(x)))
        x = F.channel_shuffle(x, 4)
        return self.head(self.c(self.up(x)).mean((2, 3)))


class Optional2(nn.Module):
    """forward(x, targets=None) gives a loss in training."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.head = conv(3, 8), conv(8, 16), nn.Linear(16, CLASSES)

    def forward(self, x: Tensor, targets: Tensor | None = None) -> Any:
        out = self.head(self.b(self.a(x)).mean((2, 3)))
        if self.training and targets is not None:
            return {"loss": F.cross_entropy(out, targets), "logits": out}
        return out


class TwoInputs(nn.Module):
    """Needs something beside the image."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.head = conv(3, 8), conv(8, 16), nn.Linear(16, CLASSES)

    def forward(self, x: Tensor, features: Tensor) -> Tensor:
        return self.head(self.b(self.a(x)).mean((2, 3)) + features)


class Video(nn.Module):
    """Takes [S, C, T, H, W]."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Conv3d(3, 8, 3), nn.Conv3d(8, 8, 3)
        self.head = nn.Linear(8, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.b(self.a(x).relu()).relu().mean((2, 3, 4)))


class Frames(Video):
    """3-D convolutions over patches of one image."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.unflatten(2, (4, 8)))


def rows() -> nn.Module:
    """1-D convolutions over the rows of an image."""
    return nn.Sequential(
        nn.Conv2d(3, 1, 1), nn.Flatten(1, 2), nn.Conv1d(32, 16, 3), nn.BatchNorm1d(16), nn.ReLU(),
        nn.Conv1d(16, 16, 3), nn.ReLU(), nn.AdaptiveMaxPool1d(1), nn.Flatten(),
        nn.Linear(16, CLASSES),
    )  # fmt: skip


def mlp() -> nn.Module:
    """No convolution at all."""
    return nn.Sequential(
        OrderedDict(flat=nn.Flatten(), a=nn.Linear(3072, 32), n=nn.BatchNorm1d(32), r=nn.ReLU(),
                    b=nn.Linear(32, 16), d=nn.Dropout(), s=nn.Sigmoid(), head=nn.Linear(16, 10))
    )  # fmt: skip


def wrapped(how: str = "parallel") -> nn.Module:
    """What people hand on: DataParallel, half precision, channels last, compiled, traced by fx."""
    net = nn.Sequential(
        conv(3, 8), conv(8, 16), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(16, CLASSES)
    )
    if how == "parallel":
        return nn.DataParallel(net)
    if how == "bfloat16":
        return net.bfloat16()
    if how == "half":
        return net.half()
    if how == "double":
        return net.double()
    if how == "channels_last":
        return net.to(memory_format=torch.channels_last)
    if how == "fx":
        return torch.fx.symbolic_trace(net.eval())
    if how == "ema":
        return torch.optim.swa_utils.AveragedModel(net)
    if how == "frozen":
        return net.requires_grad_(False)
    if how == "exported":
        return torch.export.export(net.eval(), (torch.zeros(2, 3, 32, 32),)).module()
    raise ValueError(how)


def masked() -> nn.Module:
    """Weights under torch.nn.utils.prune's masks."""
    from torch.nn.utils import prune

    net = nn.Sequential(
        conv(3, 8), nn.Conv2d(8, 16, 3), nn.ReLU(), conv(16, 16), nn.AdaptiveAvgPool2d(1),
        nn.Flatten(), nn.Linear(16, CLASSES),
    )  # fmt: skip
    prune.l1_unstructured(net[1], "weight", 0.5)
    return net


def qat() -> nn.Module:
    """Ready for training under quantisation."""
    from torch.ao.quantization import get_default_qat_qconfig, prepare_qat

    net = nn.Sequential(
        nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 16, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1),
        nn.Flatten(), nn.Linear(16, CLASSES),
    )  # fmt: skip
    net.qconfig = get_default_qat_qconfig("x86")
    return prepare_qat(net.train())


def quantised() -> nn.Module:
    """Integers."""
    from torch.ao.quantization import quantize_dynamic

    return quantize_dynamic(
        nn.Sequential(conv(3, 8), conv(8, 16), nn.AdaptiveAvgPool2d(1), nn.Flatten(),
                      nn.Linear(16, CLASSES)).eval()
    )  # fmt: skip


def parametrised(how: str = "orthogonal") -> nn.Module:
    """Weights computed by torch.nn.utils.parametrizations."""
    net = nn.Sequential(
        conv(3, 8), nn.Conv2d(8, 8, 3), nn.ReLU(), conv(8, 16), nn.AdaptiveAvgPool2d(1),
        nn.Flatten(), nn.Linear(16, 12), nn.ReLU(), nn.Linear(12, CLASSES),
    )  # fmt: skip
    getattr(nn.utils.parametrizations, how)(net[1])
    return net


class Lora(nn.Module):
    """A frozen layer beside one of low rank, on every convolution."""

    def __init__(self, layer: nn.Conv2d) -> None:
        super().__init__()
        self.layer = layer.requires_grad_(False)
        self.down = nn.Conv2d(layer.in_channels, 2, 1, bias=False)
        self.up = nn.Conv2d(2, layer.out_channels, layer.kernel_size, padding=1, bias=False)
        nn.init.zeros_(self.up.weight)

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x) + self.up(self.down(x))


def lora() -> nn.Module:
    parts = [Lora(nn.Conv2d(a, b, 3, padding=1)) for a, b in ((3, 8), (8, 16), (16, 16))]
    return nn.Sequential(*parts, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(16, CLASSES))


class Capsules(nn.Module):
    """Channels as capsules of four numbers, squashed by their length."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.caps = conv(3, 8), nn.Conv2d(8, 16, 3)
        self.b, self.head = conv(16, 16), nn.Linear(16, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        x = self.caps(self.a(x))
        y = x.unflatten(1, (4, 4))
        n = y.norm(dim=2, keepdim=True)
        x = (y * n / (1 + n * n)).flatten(1, 2)
        return self.head(self.b(x).mean((2, 3)))


class Bilinear(nn.Module):
    """Products of all channels with all (B-CNN), and nn.Bilinear."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.mix = conv(3, 8), conv(8, 6), nn.Bilinear(6, 8, 12)
        self.fc, self.head = nn.Linear(36, 16), nn.Linear(28, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        a = self.a(x)
        b = self.b(a)
        f = b.flatten(2)
        outer = (f @ f.transpose(1, 2) / f.shape[-1]).flatten(1)
        mixed = self.mix(b.mean((2, 3)), a.mean((2, 3)))
        return self.head(torch.cat([self.fc(outer).relu(), mixed], 1))


class Ghost(nn.Module):
    """Cheap features beside the others, and only some of them read."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.cheap = conv(3, 8), conv(8, 8, groups=8)
        self.b, self.head = conv(12, 16), nn.Linear(16, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        a = self.a(x)
        y = torch.cat([a, self.cheap(a)], 1)[:, :12]
        return self.head(self.b(y).mean((2, 3)))


class SelfSupervised(nn.Module):
    """A backbone with a projection for training only; two views are stacked."""

    def __init__(self) -> None:
        super().__init__()
        self.backbone = nn.Sequential(conv(3, 8), conv(8, 16))
        self.projection = nn.Sequential(nn.Linear(16, 32), nn.BatchNorm1d(32), nn.Linear(32, 8))
        self.head = nn.Linear(16, CLASSES)

    def forward(self, x: Tensor) -> Any:
        f = self.backbone(x).mean((2, 3))
        return (self.head(f), self.projection(f)) if self.training else self.head(f)


class Temperature(nn.Module):
    """Cosine logits with a scale, a buffer of centres, a counter and an int among its buffers."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.fc = conv(3, 8), conv(8, 16), nn.Linear(16, 12, bias=False)
        self.register_buffer("centres", torch.randn(CLASSES, 12))
        self.register_buffer("calls", torch.zeros((), dtype=torch.int64))
        self.scale = nn.Parameter(torch.tensor(2.0))

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        f = F.normalize(self.fc(self.b(self.a(x)).mean((2, 3))), dim=-1)
        return self.scale.exp() * f @ F.normalize(self.centres, dim=-1).t()


class Tied(nn.Module):
    """An encoder whose transposed weights decode."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = conv(3, 8), nn.Conv2d(8, 16, 3), conv(8, 8)
        self.head = nn.Linear(8, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        x = self.a(x)
        y = F.conv_transpose2d(self.b(x).relu(), self.b.weight)
        return self.head(self.c(x + y).mean((2, 3)))


class Gated(nn.Module):
    """GLU over channels, as chunk and as F.glu."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c, self.d = (
            conv(3, 8),
            nn.Conv2d(8, 32, 3),
            nn.Conv2d(16, 16, 3),
            conv(8, 12),
        )
        self.head = nn.Linear(12, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        u, v = self.b(self.a(x)).chunk(2, dim=1)
        x = F.glu(self.c(u * v.sigmoid()), dim=1)
        return self.head(self.d(x).mean((2, 3)))


class Attended(nn.Module):
    """Attention pooling: channels of one layer weigh all others, ECA beside."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.weigh = conv(3, 8), conv(8, 16), nn.Conv2d(16, 1, 1)
        self.eca, self.head = nn.Conv1d(1, 1, 3, padding=1), nn.Linear(16, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        x = self.b(self.a(x))
        x = x * self.eca(x.mean((2, 3))[:, None]).sigmoid().transpose(1, 2)[..., None]
        w = self.weigh(x).flatten(2).softmax(-1)
        return self.head((x.flatten(2) * w).sum(-1))


class NonLocal(nn.Module):
    """Products of three convolutions (an attention over places)."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.q, self.k, self.v = conv(3, 8), *(nn.Conv2d(8, 6, 1) for _ in range(3))
        self.o, self.b, self.head = nn.Conv2d(6, 8, 1), conv(8, 12), nn.Linear(12, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        x = self.a(x)
        q, k, v = (f(x).flatten(2) for f in (self.q, self.k, self.v))
        y = v @ (q.transpose(1, 2) @ k).softmax(-1).transpose(1, 2)
        return self.head(self.b(x + self.o(y.view(*y.shape[:2], *x.shape[2:]))).mean((2, 3)))


class Stochastic(nn.Module):
    """Whole blocks dropped in training (stochastic depth)."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = conv(3, 8)
        self.blocks = nn.ModuleList(nn.Sequential(conv(8, 16), conv(16, 8)) for _ in range(3))
        self.head = nn.Linear(8, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        for b in self.blocks:
            if not self.training or torch.rand(()) > 0.5:
                x = x + b(x)
        return self.head(x.mean((2, 3)))


class Caught(nn.Module):
    """`.float()`, `.type_as`, `.to(x.dtype)` and numpy on the way."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = conv(3, 8), conv(8, 16), conv(16, 16)
        self.register_buffer("mean", torch.full((3, 1, 1), 0.5))
        self.head = nn.Linear(16, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        x = x.float() - self.mean.type_as(x)
        k = torch.from_numpy(self.mean.cpu().numpy()).mean().to(x.dtype)
        return self.head(self.c(self.b(self.a(x)) * k).float().mean((2, 3)))


class Positions(nn.Module):
    """Coordinates of every place as two more channels; a grid sample with learnt offsets."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = conv(5, 8), conv(8, 12), conv(12, 12)
        self.locate, self.head = nn.Linear(8, 6), nn.Linear(12, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        s = [torch.linspace(-1, 1, n, device=x.device, dtype=x.dtype) for n in x.shape[2:]]
        where = torch.stack(torch.meshgrid(*s, indexing="ij")).expand(x.shape[0], -1, -1, -1)
        x = self.a(torch.cat([x, where], 1))
        theta = self.locate(x.mean((2, 3))).view(-1, 2, 3)
        x = F.grid_sample(self.b(x), F.affine_grid(theta, [*x.shape], align_corners=False))
        return self.head(self.c(x).mean((2, 3)))


class ManyCalls(nn.Module):
    """One normalisation and one convolution called in two places with other neighbours."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.shared, self.norm = (
            conv(3, 8),
            conv(8, 8),
            nn.Conv2d(8, 8, 3, padding=1),
            nn.BatchNorm2d(8),
        )
        self.c, self.head = conv(8, 8), nn.Linear(8, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm(self.shared(self.a(x))).relu()
        x = self.norm(self.shared(self.b(x))).relu()
        return self.head(self.c(x).mean((2, 3)))


class Unused(nn.Module):
    """A layer that is never called, one whose output is thrown away, one of no width."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.never, self.thrown = conv(3, 8), conv(8, 16), conv(8, 4), conv(8, 4)
        self.nothing, self.head = nn.Identity(), nn.Linear(16, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        x = self.a(x)
        self.thrown(x)
        return self.head(self.nothing(self.b(x)).mean((2, 3)))
