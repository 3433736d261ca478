"""Train the small nets of `moe_fair.vision.zoo` on scikit-learn's digits, upsampled to 32 × 32.

    python eval/train_digits.py --nets vgg_small resnet20 --seeds 5 -o digits
    python eval/train_digits.py --data characters --images 20000 --epochs 10 -o characters

writes `digits/NET-SEED.safetensors` and prints each net's top-1 on the held-out fifth. What exists
is not trained again. SGD with momentum .9, learning rate .05 falling to 0 along a cosine, batches
of 64, weight decay 5e-4; images are shifted by up to two pixels. Nets that the zoo has not are
`character_nets.py`'s, of which some train with AdamW, learning rate .002, weight decay .05.
"""

from __future__ import annotations

import argparse
import math
import sys
from pathlib import Path

import character_nets
import torch
from character_nets import ADAMW
from characters import characters
from safetensors.torch import save_file
from torch import Tensor, nn

from moe_fair.vision import zoo
from moe_fair.vision.accuracy import top1
from moe_fair.vision.data import Data, open_data
from moe_fair.vision.load import load_weights
from moe_fair.vision.preprocessing import Preprocessing

RATE, DECAY, BATCH, SHIFT = 0.05, 5e-4, 64, 2
ADAMW_RATE, ADAMW_DECAY = 2e-3, 0.05


def main() -> None:
    """Train what is missing."""
    args = _arguments()
    data = opened(args.data, args.images)
    args.output.mkdir(parents=True, exist_ok=True)
    for net in args.nets:
        for seed in range(args.seeds):
            model, file = fresh(net, seed, data), args.output / f"{net}-{seed}.safetensors"
            if file.exists():
                load_weights(model, file)
            else:
                # a third faster; digits without, and what has no convolutions gains nothing
                if args.data == "characters" and net not in ("vit_small", "convnext_small"):
                    model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
                train(model, data, args.epochs, seed, adamw=net in ADAMW)
                model.to(memory_format=torch.contiguous_format)  # type: ignore[call-overload]
                partial = file.with_suffix(".partial")
                save_file(model.state_dict(), partial)
                partial.replace(file)
            print(f"{net} seed {seed}: top-1 {top1(model, data.test, 128):.2%}", flush=True)


def digits() -> Data:
    """The digits as `moe-fair vision prune --data digits` sees them for these nets."""
    return open_data("digits", Preprocessing(channels=1, size=32))


def opened(name: str, images: int) -> Data:
    """The digits, or so many of `characters.py` to train on."""
    return digits() if name == "digits" else characters(images)


def fresh(net: str, seed: int, data: Data) -> nn.Module:
    """A net for one-channel images, with this seed's random weights."""
    torch.manual_seed(seed)
    make = getattr(zoo, net, None) or getattr(character_nets, net)
    model: nn.Module = make(len(data.train.classes), in_channels=1)
    return model.eval()


def train(model: nn.Module, data: Data, epochs: int, seed: int, *, adamw: bool = False) -> None:
    """Train in place; leaves the model in eval mode."""
    images, labels = data.train.tensors()
    generator = torch.Generator().manual_seed(seed)
    optimizer: torch.optim.Optimizer = torch.optim.SGD(
        model.parameters(), lr=RATE, momentum=0.9, weight_decay=DECAY, nesterov=True
    )
    if adamw:
        optimizer = torch.optim.AdamW(model.parameters(), ADAMW_RATE, weight_decay=ADAMW_DECAY)
    steps = math.ceil(len(images) / BATCH)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps * epochs)
    model.train()
    for epoch in range(epochs):
        total = 0.0
        order = torch.randperm(len(images), generator=generator)
        for at in range(0, len(images), BATCH):
            ids = order[at : at + BATCH]
            x = shifted(images[ids], generator)
            loss = nn.functional.cross_entropy(model(x), labels[ids])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
            total += float(loss.detach())
        print(f"epoch {epoch + 1}: loss {total / steps:.3f}", file=sys.stderr, flush=True)
    model.eval()


def shifted(images: Tensor, generator: torch.Generator) -> Tensor:
    """The batch moved by up to SHIFT pixels each way, the edge repeated."""
    dy, dx = (int(i) for i in torch.randint(0, 2 * SHIFT + 1, (2,), generator=generator))
    padded = nn.functional.pad(images, (SHIFT,) * 4, mode="replicate")
    h, w = images.shape[2:]
    return padded[:, :, dy : dy + h, dx : dx + w]


def add_data(parser: argparse.ArgumentParser) -> None:
    """The options that say which images."""
    parser.add_argument("--data", choices=["digits", "characters"], default="digits")
    parser.add_argument("--images", type=int, default=20_000, help="characters to train on")


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--nets", nargs="+", default=["vgg_small", "resnet20"])
    add_data(parser)
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--epochs", type=int, default=15)
    parser.add_argument("-o", "--output", type=Path, default=Path("digits"))
    return parser.parse_args()


if __name__ == "__main__":
    main()
