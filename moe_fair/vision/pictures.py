"""Image files as models are given them: upright, eight bits, without transparency.

Sixteen bits and floats (0 to 1) are scaled, where Pillow's own conversion cuts them off and leaves
white; EXIF orientation is applied; what is transparent is white.
"""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np

NAMED = 3  # bad files that a refusal names
# how files of these kinds end, and within how many bytes; one that does not is decoded
ENDS = {"JPEG": b"\xff\xd9", "GIF": b"\x3b"}
TAIL = 64


def converted(image: Any, mode: str) -> Any:
    """The picture in mode "L" or "RGB".

    Raises:
        ValueError: pixels whose range, or whose colours, are not known.
    """
    from PIL import Image, ImageOps

    image = ImageOps.exif_transpose(image)
    if image.mode.startswith("I;16"):
        image = _scaled(image, 65535)
    elif image.mode == "I":
        image = _whole(image)
    elif image.mode == "F":
        pixels = np.asarray(image)
        if not (pixels.min() >= 0 and pixels.max() <= 1):  # a NaN is outside as well
            raise ValueError("floating point pixels outside of 0..1: convert it to 8 or 16 bits")
        image = _scaled(image, 1)
    if image.mode[-1] in "Aa" or "transparency" in image.info:
        image = image.convert("RGBA")
        white = Image.new("RGBA", image.size, (255, 255, 255, 255))
        image = Image.alpha_composite(white, image).convert("RGB")
    return image.convert(mode)


def _whole(image: Any) -> Any:
    """Of 32-bit pixels, in which older Pillow has those of 16-bit PNG as well."""
    pixels = np.asarray(image)
    if image.format == "PNG" or (pixels.min() >= 0 and 255 < pixels.max() <= 65535):
        return _scaled(image, 65535)
    raise ValueError("32-bit whole numbers, whose range is not known: convert it to 8 or 16 bits")


def _scaled(image: Any, most: float) -> Any:
    from PIL import Image

    pixels = np.asarray(image).astype(np.float64) * (255 / most)
    return Image.fromarray(pixels.round().astype(np.uint8))


def check_files(files: Sequence[Path], folder: Path) -> None:
    """Every file can be read.

    Raises:
        ValueError: some cannot; names the first ones.
    """
    with ThreadPoolExecutor() as pool:  # Pillow lets others run while it reads
        found = list(pool.map(_fault, files))
    bad = [f"{file} ({why})" for file, why in zip(files, found, strict=True) if why]
    if bad:
        more = f" and {len(bad) - NAMED} more" if len(bad) > NAMED else ""
        raise ValueError(
            f"{len(bad)} of {len(files)} images of {folder} cannot be read: "
            f"{', '.join(bad[:NAMED])}{more}; mend or remove them"
        )


def _fault(file: Path) -> str:
    """What is wrong with a file, or nothing. Only what is doubtful is decoded: sets are large."""
    from PIL import Image

    try:
        with Image.open(file) as image:
            kind, mode = image.format, image.mode
            if kind == "PNG":
                image.verify()  # its checksums
        if mode in ("I", "F") or not (kind == "PNG" or _ends(file, kind)):
            with Image.open(file) as image:
                image.load()
                converted(image, "RGB")
    except Exception as e:  # Pillow raises SyntaxError, struct.error, ... on damaged files
        return " ".join(str(e).split())[:120].replace(str(file), "it") or type(e).__name__
    return ""


def _ends(file: Path, kind: str | None) -> bool:
    """The file's last bytes are those of a whole file of its kind."""
    if kind not in ENDS:
        return False
    with file.open("rb") as f:
        f.seek(max(0, file.stat().st_size - TAIL))
        return ENDS[kind] in f.read()
