"""More nets as people write them by hand, for `vision_nets.py`; what is unusual is between a
convolution at the start and a classifier at the end.

All take images of 3 × 32 × 32 and say something about ten classes.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from own_nets import CLASSES, conv
from torch import Tensor, nn


class Around(nn.Module):
    """Stem, what `middle` does, another convolution, pooling and a classifier."""

    def __init__(self, width: int = 16, out: int = 16) -> None:
        super().__init__()
        self.stem, self.behind = conv(3, width, stride=2), conv(out, 12)
        self.head = nn.Linear(12, CLASSES)

    def middle(self, x: Tensor) -> Tensor:
        raise NotImplementedError

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.behind(self.middle(self.stem(x))).mean((2, 3)))


class Focus(Around):
    """YOLOv5's: four phases of the picture as channels, in front of a convolution."""

    def __init__(self) -> None:
        super().__init__()
        self.mix = conv(64, 16)

    def middle(self, x: Tensor) -> Tensor:
        phases = [x[..., i::2, j::2] for i in (0, 1) for j in (0, 1)]
        return self.mix(torch.cat(phases, 1))


class C2f(Around):
    """YOLOv8's: chunks, each convolved from the one before, all concatenated."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = conv(16, 16, 1), conv(32, 16, 1)
        self.parts = nn.ModuleList([conv(8, 8), conv(8, 8)])

    def middle(self, x: Tensor) -> Tensor:
        y = list(self.first(x).chunk(2, 1))
        y.extend(m(y[-1]) for m in self.parts)
        return self.last(torch.cat(y, 1))


class RepBranches(Around):
    """RepVGG in training: 3 × 3, 1 × 1 and an identity with a normalisation."""

    def __init__(self) -> None:
        super().__init__()
        self.three, self.one = nn.Conv2d(16, 16, 3, padding=1), nn.Conv2d(16, 16, 1)
        self.identity = nn.BatchNorm2d(16)

    def middle(self, x: Tensor) -> Tensor:
        return (self.three(x) + self.one(x) + self.identity(x)).relu()


class TorchEncoder(Around):
    """torch's own TransformerEncoder on the places of a map."""

    def __init__(self) -> None:
        super().__init__()
        layer = nn.TransformerEncoderLayer(16, 2, 24, batch_first=True, dropout=0.0)
        self.encoder = nn.TransformerEncoder(layer, 1, enable_nested_tensor=False)

    def middle(self, x: Tensor) -> Tensor:
        return self.encoder(x.flatten(2).transpose(1, 2)).transpose(1, 2).reshape(x.shape)


class AttentionPool(nn.Module):
    """CLIP's: the mean asks all places through torch's own MultiheadAttention."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.more = conv(3, 16, stride=4), conv(16, 16)
        self.pool, self.head = nn.MultiheadAttention(16, 4), nn.Linear(16, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        tokens = self.more(self.stem(x)).flatten(2).permute(2, 0, 1)
        found, _ = self.pool(tokens.mean(0, keepdim=True), tokens, tokens, need_weights=False)
        return self.head(found.squeeze(0))


class Unfolded(Around):
    """A convolution as unfold and a linear layer."""

    def __init__(self) -> None:
        super().__init__()
        self.kernel = nn.Linear(16 * 9, 16)

    def middle(self, x: Tensor) -> Tensor:
        patches = F.unfold(x, 3, padding=1).transpose(1, 2)
        return self.kernel(patches).transpose(1, 2).reshape(x.shape).relu()


class Functional(Around):
    """A layer's weight is used without calling the layer."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Conv2d(16, 16, 3)

    def middle(self, x: Tensor) -> Tensor:
        return F.conv2d(x, self.layer.weight, self.layer.bias, padding=1).relu()


class SoftExperts(Around):
    """A mixture of convolutions, weighted for each image."""

    def __init__(self) -> None:
        super().__init__()
        self.experts = nn.ModuleList([conv(16, 16) for _ in range(3)])
        self.router = nn.Linear(16, 3)

    def middle(self, x: Tensor) -> Tensor:
        shares = self.router(x.mean((2, 3))).softmax(-1)
        found = torch.stack([e(x) for e in self.experts], 1)
        return (found * shares[:, :, None, None, None]).sum(1)


class TopExperts(SoftExperts):
    """The best expert of each image only, found by indexing."""

    def middle(self, x: Tensor) -> Tensor:
        best = self.router(x.mean((2, 3))).argmax(-1)
        out = torch.zeros_like(x)
        for i, expert in enumerate(self.experts):
            if bool((best == i).any()):
                out[best == i] = expert(x[best == i])
        return out


class Selective(Around):
    """SKNet's: softmax over branches, a channel at a time."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = conv(16, 16), conv(16, 16, 5)
        self.down, self.up = nn.Linear(16, 4), nn.Linear(4, 32)

    def middle(self, x: Tensor) -> Tensor:
        both = torch.stack([self.a(x), self.b(x)], 1)
        z = self.up(self.down(both.sum(1).mean((2, 3))).relu())
        return (both * z.view(-1, 2, 16, 1, 1).softmax(1)).sum(1)


class Mixer(Around):
    """An MLP over places, then one over channels."""

    def __init__(self) -> None:
        super().__init__()
        self.places = nn.Sequential(nn.Linear(256, 24), nn.GELU(), nn.Linear(24, 256))
        self.channels = nn.Sequential(nn.Linear(16, 32), nn.GELU(), nn.Linear(32, 16))

    def middle(self, x: Tensor) -> Tensor:
        y = x.flatten(2)
        y = (y + self.places(y)).transpose(1, 2)
        return (y + self.channels(y)).transpose(1, 2).reshape(x.shape)


class Shift(Around):
    """Parts of the channels move to the four sides, by slices that are assigned."""

    def __init__(self) -> None:
        super().__init__()
        self.after = conv(16, 16, 1)

    def middle(self, x: Tensor) -> Tensor:
        y = torch.zeros_like(x)
        y[:, :4, 1:] = x[:, :4, :-1]
        y[:, 4:8, :-1] = x[:, 4:8, 1:]
        y[:, 8:12, :, 1:] = x[:, 8:12, :, :-1]
        y[:, 12:, :, :-1] = x[:, 12:, :, 1:]
        return self.after(y)


class Flipped(Around):
    """The channels in reverse order, then rolled by one."""

    def middle(self, x: Tensor) -> Tensor:
        return x.flip(1).roll(1, 1) + x


class Unshuffled(Around):
    """PixelUnshuffle: places become channels."""

    def __init__(self) -> None:
        super().__init__(out=64)
        self.down = nn.PixelUnshuffle(2)

    def middle(self, x: Tensor) -> Tensor:
        return self.down(x)


class LocalResponse(Around):
    """AlexNet's normalisation over neighbouring channels."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.more = nn.LocalResponseNorm(5, alpha=1.0), conv(16, 16)

    def middle(self, x: Tensor) -> Tensor:
        return self.more(self.norm(x))


class ResponseInline(Around):
    """ConvNeXt V2's normalisation within a block's own forward."""

    def __init__(self) -> None:
        super().__init__()
        self.wide, self.back = nn.Conv2d(16, 32, 1), nn.Conv2d(32, 16, 1)
        self.gamma, self.beta = (nn.Parameter(torch.ones(1, 32, 1, 1)) for _ in range(2))

    def middle(self, x: Tensor) -> Tensor:
        y = F.gelu(self.wide(x))
        gx = torch.norm(y, p=2, dim=(2, 3), keepdim=True)
        nx = gx / (gx.mean(1, keepdim=True) + 1e-6)
        return x + self.back(self.gamma * (y * nx) + self.beta + y)


class Response(nn.Module):
    """ConvNeXt V2's normalisation, as its authors write it."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.gamma = nn.Parameter(torch.zeros(1, 1, 1, channels))
        self.beta = nn.Parameter(torch.zeros(1, 1, 1, channels))

    def forward(self, x: Tensor) -> Tensor:
        gx = torch.norm(x, p=2, dim=(1, 2), keepdim=True)
        nx = gx / (gx.mean(dim=-1, keepdim=True) + 1e-6)
        return self.gamma * (x * nx) + self.beta + x


class ResponseModule(Around):
    """The same as a module, between two linear layers."""

    def __init__(self) -> None:
        super().__init__()
        self.wide, self.norm, self.back = nn.Linear(16, 32), Response(32), nn.Linear(32, 16)

    def middle(self, x: Tensor) -> Tensor:
        y = self.back(self.norm(F.gelu(self.wide(x.permute(0, 2, 3, 1)))))
        return x + y.permute(0, 3, 1, 2)


class ResponseOfAll(Around):
    """The same over a whole stream of two parts that are made apart."""

    def __init__(self) -> None:
        super().__init__(out=32)
        self.other, self.norm = conv(16, 16), Response(32)

    def middle(self, x: Tensor) -> Tensor:
        y = torch.cat([x, self.other(x)], 1).permute(0, 2, 3, 1)
        return self.norm(y).permute(0, 3, 1, 2)


class CosineHead(nn.Module):
    """Faces: normalised features against normalised weights, of a bare parameter."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = conv(3, 16, stride=2), conv(16, 16, stride=2)
        self.centres = nn.Parameter(torch.randn(CLASSES, 16))

    def forward(self, x: Tensor) -> Tensor:
        y = self.b(self.a(x)).mean((2, 3))
        return 16 * F.linear(F.normalize(y), F.normalize(self.centres))


class Prototypes(CosineHead):
    """Distances to a prototype of each class."""

    def forward(self, x: Tensor) -> Tensor:
        return -torch.cdist(self.b(self.a(x)).mean((2, 3)), self.centres)


class GeM(Around):
    """Generalised mean pooling with a learned power."""

    def __init__(self) -> None:
        super().__init__()
        self.power = nn.Parameter(torch.tensor(3.0))

    def forward(self, x: Tensor) -> Tensor:
        y = self.behind(self.stem(x)).clamp(min=1e-6).pow(self.power)
        return self.head(y.mean((2, 3)).pow(1 / self.power))


class VLAD(Around):
    """NetVLAD: differences to centres, softly assigned, normalised."""

    def __init__(self) -> None:
        super().__init__()
        self.assign, self.centres = nn.Conv2d(12, 4, 1), nn.Parameter(torch.randn(4, 12))
        self.head = nn.Linear(48, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        y = self.behind(self.stem(x))
        a = self.assign(y).flatten(2).softmax(1)
        y = y.flatten(2)
        found = torch.einsum("ska,sca->skc", a, y) - a.sum(-1)[..., None] * self.centres
        return self.head(F.normalize(found, dim=-1).flatten(1))


class DynamicConv(Around):
    """CondConv: kernels mixed for each image, run as groups of one batch."""

    def __init__(self) -> None:
        super().__init__()
        self.kernels = nn.Parameter(0.1 * torch.randn(3, 16, 16, 3, 3))
        self.router = nn.Linear(16, 3)

    def middle(self, x: Tensor) -> Tensor:
        shares = self.router(x.mean((2, 3))).softmax(-1)
        kernels = torch.einsum("sk,koihw->soihw", shares, self.kernels).flatten(0, 1)
        out = F.conv2d(x.reshape(1, -1, *x.shape[2:]), kernels, padding=1, groups=len(x))
        return out.reshape(x.shape)


class ChannelsAsDepth(Around):
    """A three-dimensional convolution along the channels."""

    def __init__(self) -> None:
        super().__init__()
        self.deep = nn.Conv3d(1, 1, 3, padding=1)

    def middle(self, x: Tensor) -> Tensor:
        return self.deep(x[:, None])[:, 0]


class Octave(Around):
    """Half of the channels at half the size; each half reads both."""

    def __init__(self) -> None:
        super().__init__()
        self.fast, self.slow = conv(16, 8), conv(16, 8)
        self.fast2, self.slow2 = conv(8, 16), conv(8, 16)

    def middle(self, x: Tensor) -> Tensor:
        high, low = self.fast(x), self.slow(F.avg_pool2d(x, 2))
        return self.fast2(high) + F.interpolate(self.slow2(low), scale_factor=2.0)


class Unpooled(Around):
    """SegNet's: maxima go back to their places."""

    def __init__(self) -> None:
        super().__init__()
        self.pool, self.unpool = nn.MaxPool2d(2, return_indices=True), nn.MaxUnpool2d(2)
        self.between = conv(16, 16)

    def middle(self, x: Tensor) -> Tensor:
        small, where = self.pool(x)
        return self.unpool(self.between(small), where)


class ChannelSoftmax(Around):
    """Softmax over channels in the middle, and RMSNorm over them."""

    def __init__(self) -> None:
        super().__init__()
        self.soft, self.norm, self.more = nn.Softmax2d(), nn.RMSNorm(16), conv(16, 16)

    def middle(self, x: Tensor) -> Tensor:
        y = self.norm(self.more(self.soft(x)).permute(0, 2, 3, 1))
        return y.permute(0, 3, 1, 2)


class OwnLayerNorm(Around):
    """LayerNorm over channels in its author's own words, and a learned Swish of each channel."""

    def __init__(self) -> None:
        super().__init__()
        self.scale, self.beta = nn.Parameter(torch.ones(16)), nn.Parameter(torch.ones(16))
        self.more = conv(16, 16)

    def middle(self, x: Tensor) -> Tensor:
        y = self.more(x)
        y = y * torch.sigmoid(self.beta[:, None, None] * y)
        mean = y.mean(1, keepdim=True)
        variance = (y - mean).pow(2).mean(1, keepdim=True)
        return self.scale[:, None, None] * (y - mean) / (variance + 1e-6).sqrt()


class WithImage(Around):
    """Features and the small picture itself side by side."""

    def __init__(self) -> None:
        super().__init__(out=19)

    def forward(self, x: Tensor) -> Tensor:
        y = torch.cat([F.avg_pool2d(x, 2), self.stem(x)], 1)
        return self.head(self.behind(y).mean((2, 3)))


class Coordinates(Around):
    """CoordConv: the places' coordinates before and behind the features, read by two layers."""

    def __init__(self) -> None:
        super().__init__(out=17)
        self.norm, self.more = nn.BatchNorm2d(18), conv(18, 16)

    def middle(self, x: Tensor) -> Tensor:
        line = torch.linspace(-1, 1, x.shape[-1], dtype=x.dtype, device=x.device)
        line = line.expand(len(x), 1, *x.shape[2:])
        y = self.more(self.norm(torch.cat([line.mT, x, line], 1)))
        return torch.cat((line, y), dim=-3)


class TopChannels(Around):
    """Of each image the eight channels with the largest means stay."""

    def middle(self, x: Tensor) -> Tensor:
        means = x.mean((2, 3))
        least = means.topk(8, 1).values[:, -1:]
        return x * (means >= least)[:, :, None, None]


class Gram(Around):
    """Products of all pairs of channels, as style does."""

    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Linear(144, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        y = self.behind(self.stem(x)).flatten(2)
        return self.head((y @ y.transpose(1, 2) / y.shape[-1]).flatten(1))


class LinearAttention(Around):
    """Keys and values meet first; q, k and v from one 1 × 1 convolution."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv, self.out = nn.Conv2d(16, 48, 1, bias=False), nn.Conv2d(16, 16, 1)

    def middle(self, x: Tensor) -> Tensor:
        q, k, v = (t.unflatten(1, (2, 8)).flatten(3) for t in self.qkv(x).chunk(3, 1))
        context = torch.einsum("shdn,shen->shde", k.softmax(-1), v)
        found = torch.einsum("shde,shdn->shen", context, q.softmax(-2))
        return x + self.out(found.reshape(x.shape))


class Registers(Around):
    """Attention with registers: learned tokens beside the places."""

    def __init__(self) -> None:
        super().__init__()
        self.registers = nn.Parameter(torch.randn(1, 4, 16))
        self.norm, self.q, self.kv = nn.LayerNorm(16), nn.Linear(16, 16), nn.Linear(16, 32)
        self.out = nn.Linear(16, 16)

    def middle(self, x: Tensor) -> Tensor:
        tokens = torch.cat([self.registers.expand(len(x), -1, -1), x.flatten(2).mT], 1)
        y = self.norm(tokens)
        k, v = self.kv(y).chunk(2, -1)
        y = tokens + self.out(F.scaled_dot_product_attention(self.q(y), k, v))
        return y[:, 4:].mT.reshape(x.shape)


class Involution(Around):
    """A kernel for every place, made from the place itself."""

    def __init__(self) -> None:
        super().__init__()
        self.reduce, self.spread = nn.Conv2d(16, 4, 1), nn.Conv2d(4, 9 * 4, 1)

    def middle(self, x: Tensor) -> Tensor:
        s, _, h, w = x.shape
        kernel = self.spread(self.reduce(x)).view(s, 4, 1, 9, h, w)
        patches = F.unfold(x, 3, padding=1).view(s, 4, 4, 9, h, w)
        return (kernel * patches).sum(3).view(s, 16, h, w)
