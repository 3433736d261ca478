"""Small whole numbers in 32-bit words, the first in the lowest bits, along the last axis."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def unpack_words(words: Tensor, bits: int, order: Sequence[int] | None = None) -> Tensor:
    """[..., n · 32/bits] bytes of [..., n] words.

    Args:
        order: place in the word of each number in turn; by default as they come.
    """
    if order is None and bits in (4, 8):  # as they lie in the words' bytes: far quicker
        its = words.contiguous().view(torch.uint8)
        return its if bits == 8 else torch.stack([its & 15, its >> 4], -1).flatten(-2)
    places = order or range(32 // bits)
    shifts = torch.tensor([p * bits for p in places], dtype=torch.int32, device=words.device)
    numbers = (words.unsqueeze(-1) >> shifts) & (2**bits - 1)
    return numbers.to(torch.uint8).flatten(-2)


def pack_words(numbers: Tensor, bits: int, order: Sequence[int] | None = None) -> Tensor:
    """The inverse."""
    each = 32 // bits
    places = order or range(each)
    words = torch.zeros(
        *numbers.shape[:-1], numbers.shape[-1] // each, dtype=torch.int64, device=numbers.device
    )
    for i, place in enumerate(places):
        words |= numbers[..., i::each].long() << (place * bits)
    # as the same 32 bits with a sign
    return torch.where(words >= 2**31, words - 2**32, words).to(torch.int32)
