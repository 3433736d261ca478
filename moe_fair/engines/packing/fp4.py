"""The sixteen numbers of FP4 (e2m1), two codes to a byte, the first in the lower half."""

from __future__ import annotations

import torch
from torch import Tensor

NUMBERS = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
LARGEST = 6.0
# between two numbers, and whether the border itself belongs to the upper one: to the even code
BORDERS = (0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5.0)


def unpack_bytes(codes: Tensor) -> Tensor:
    """[..., 2n] numbers in float32 of [..., n] bytes."""
    table = torch.tensor([*NUMBERS, *(-n for n in NUMBERS)], device=codes.device)
    both = torch.stack([codes & 15, codes >> 4], -1).flatten(-2)
    return table[both.int()]


def pack_bytes(values: Tensor) -> Tensor:
    """[..., n] bytes of [..., 2n] numbers, each rounded to the nearest, ties to the even code."""
    codes = torch.zeros(values.shape, dtype=torch.uint8, device=values.device)
    size = values.abs()
    for i, border in enumerate(BORDERS):
        codes += (size > border) if i % 2 == 0 else (size >= border)
    codes += 8 * values.signbit().to(torch.uint8)
    low, high = codes.unflatten(-1, (-1, 2)).unbind(-1)
    return low | (high << 4)
