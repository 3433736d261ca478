"""Images of characters among clutter: harder than digits, from the fonts that matplotlib brings.

    python eval/characters.py -o characters.png      # a sheet of them to look at
    python eval/train_digits.py --data characters --nets vgg_small resnet20 --seeds 3 -o nets
    python eval/digits_table.py --data characters --nets nets -o characters.jsonl

Fifty classes: letters, digits and Greek in thirteen fonts, of random size, place and angle (up to
30 degrees), light on dark or dark on light over a sloping ground, with parts of other characters,
lines and noise. Image i of a seed is always the same one; nothing is stored.
"""

from __future__ import annotations

import argparse
from functools import cache
from pathlib import Path

import matplotlib
import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from moe_fair.vision.data import Data, ImageSet

CLASSES = "ABDEFGHJKLMNQRTYabdefghnrty23456789ΓΔΘΛΞΠΣΦΨΩλπξφμ"
FONTS = (
    "DejaVuSans", "DejaVuSans-Bold", "DejaVuSans-Oblique", "DejaVuSans-BoldOblique",
    "DejaVuSansMono", "DejaVuSansMono-Bold", "DejaVuSerif", "DejaVuSerif-Bold",
    "DejaVuSerif-Italic", "STIXGeneral", "STIXGeneralBol", "STIXGeneralItalic",
    "STIXGeneralBolIta",
)  # fmt: skip
SIZE, LARGE = 32, 48  # of an image, and of what a character is drawn on before it is turned
SMALLEST, LARGEST, TURN, MOVED = 15, 24, 30, 4
NOISE = 0.1


@cache
def _glyph(font: int, size: int, which: int) -> Image.Image:
    """A character in the middle of a square."""
    file = Path(matplotlib.get_data_path(), "fonts", "ttf", f"{FONTS[font]}.ttf")
    drawn = Image.new("L", (LARGE, LARGE))
    face = ImageFont.truetype(str(file), size)
    ImageDraw.Draw(drawn).text((LARGE / 2,) * 2, CLASSES[which], 255, font=face, anchor="mm")
    return drawn


def image(seed: int, number: int) -> tuple[np.ndarray, int]:
    """[SIZE, SIZE] float32 in -1..1, and its class."""
    g = np.random.default_rng((seed, number))
    label = int(g.integers(len(CLASSES)))

    def placed(which: int, moved: np.ndarray) -> np.ndarray:
        """The character, turned and moved, 0 to 1."""
        font, size = int(g.integers(len(FONTS))), int(g.integers(SMALLEST, LARGEST + 1))
        turned = _glyph(font, size, which).rotate(float(g.uniform(-TURN, TURN)), Image.BILINEAR)
        left, top = ((LARGE - SIZE) / 2 - moved).astype(int)
        box = (left, top, left + SIZE, top + SIZE)
        return np.asarray(turned.crop(box), dtype=np.float32) / 255

    slope = g.uniform(-0.3, 0.3, 2)
    axis = np.linspace(-1, 1, SIZE)
    ground = g.uniform(-0.4, 0.4) + slope[0] * axis[:, None] + slope[1] * axis
    sign = g.choice([-1.0, 1.0])
    for _ in range(2):  # parts of others, at the rim
        angle = g.uniform(0, 2 * np.pi)
        rim = np.array([np.cos(angle), np.sin(angle)]) * g.uniform(15, 19)
        ground += g.uniform(0.3, 0.7) * sign * placed(int(g.integers(len(CLASSES))), rim)
    lines = Image.new("L", (SIZE, SIZE))
    for _ in range(2):
        ImageDraw.Draw(lines).line([int(v) for v in g.integers(0, SIZE, 4)], 255)
    ground += g.uniform(0.3, 0.6) * g.choice([-1, 1]) * np.asarray(lines, dtype=np.float32) / 255
    ground += g.uniform(0.5, 1.0) * sign * placed(label, g.uniform(-MOVED, MOVED, 2))
    ground += NOISE * g.standard_normal((SIZE, SIZE))
    return ground.clip(-1, 1).astype(np.float32), label


def _set(seed: int, count: int) -> ImageSet:
    made = [image(seed, i) for i in range(count)]
    pixels = torch.from_numpy(np.stack([x for x, _ in made]))[:, None]

    def read(i: int) -> Tensor:
        return pixels[i]

    return ImageSet(read, [y for _, y in made], tuple(CLASSES), lambda x: x, "characters")


def characters(train: int = 50_000, test: int = 2_000) -> Data:
    """So many images to train on and to test on."""
    return Data(_set(0, train), _set(1, test))


def main() -> None:
    """Draw the sheet."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("-o", "--output", type=Path, required=True)
    rows = [np.concatenate([image(0, 20 * r + c)[0] for c in range(20)], 1) for r in range(10)]
    sheet = Image.fromarray(((np.concatenate(rows) + 1) * 127.5).astype(np.uint8))
    sheet.resize((sheet.width * 2, sheet.height * 2)).save(parser.parse_args().output)


if __name__ == "__main__":
    main()
