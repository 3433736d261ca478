"""FP8 with a scale for every square of a matrix (DeepSeek-V3, Qwen, MiniMax: `weight_scale_inv`).

    w[i, j] = code[i, j] · scale[i // b, j // b]

The last squares of a row or column may be cut off (DeepSeek's 576 rows in squares of 128). A scale
that is a single number is of the whole matrix.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from moe_fair.engines.packing.fp8 import numbers
from moe_fair.engines.packing.scheme import (
    CODES,
    FLOATS,
    FP8_LARGEST,
    SCALE,
    PackedWeight,
    expect,
    gather,
)
from moe_fair.engines.shards import StoredTensor

SQUARE = (128, 128)


class BlockFP8:
    """See the module.

    Args:
        settings: `quantization_config`.

    Raises:
        ValueError: they name no square.
    """

    name = "fp8"

    def __init__(self, settings: Mapping[str, Any]) -> None:
        square = settings.get("weight_block_size", SQUARE) or SQUARE
        if len(square) != 2 or not all(isinstance(n, int) and n > 0 for n in square):
            raise ValueError(f"weight_block_size {square} in config.json is no two whole numbers")
        self.rows, self.columns = int(square[0]), int(square[1])
        # powers of two, as in later DeepSeek models
        self.exponents = settings.get("scale_fmt") == "ue8m0"

    def find(self, tensors: Sequence[StoredTensor]) -> list[PackedWeight]:
        """See `Scheme`."""
        roles = {CODES: "", SCALE: "_scale_inv"}
        found = []
        for name, parts in gather(tensors, roles, (CODES, SCALE)).items():
            codes, scale = parts[CODES], parts[SCALE]
            expect(codes, ["F8_E4M3"], codes.shape, "FP8")
            if len(codes.shape) < 2:
                raise ValueError(f"{codes.name} {list(codes.shape)} is packed, and no matrix")
            wanted: tuple[int, ...] = scale.shape
            if scale.numel > 1 or len(scale.shape) > 1:
                *more, r, c = codes.shape
                wanted = (*more, -(-r // self.rows), -(-c // self.columns))
            why = f"FP8 in squares of {self.rows} × {self.columns}"
            expect(scale, [*FLOATS, "F8_E8M0"], wanted, why)
            found.append(PackedWeight(name, codes.shape, parts))
        return found

    def unpack(self, weight: PackedWeight, parts: Mapping[str, Tensor]) -> Tensor:
        """See `Scheme`."""
        values, scale = numbers(parts[CODES]), parts[SCALE].float()
        return self._times(values, scale)

    def pack(
        self, weight: PackedWeight, values: Tensor, like: Mapping[str, Tensor]
    ) -> dict[str, Tensor]:
        """See `Scheme`; the largest number of a square becomes the largest code."""
        old = like[SCALE]
        if old.numel() == 1:
            largest = values.abs().max().view(old.shape)
        else:
            *more, r, c = values.shape
            rows, columns = old.shape[-2:]
            padded = values.new_zeros(*more, rows * self.rows, columns * self.columns)
            padded[..., :r, :c] = values.abs()
            squares = padded.view(*more, rows, self.rows, columns, self.columns)
            largest = squares.amax((-3, -1))
        scale = (largest / FP8_LARGEST).clamp_min(torch.finfo(torch.float32).tiny)
        if self.exponents:
            scale = scale.log2().ceil().exp2()
        scale = scale.to(old.dtype)
        codes = self._times(values.float().clone(), 1 / scale.float())
        return {CODES: codes.clamp_(-FP8_LARGEST, FP8_LARGEST).to(like[CODES].dtype), SCALE: scale}

    def _times(self, values: Tensor, scale: Tensor) -> Tensor:
        """Multiply in place; a band of squares at a time, which needs no scale for every weight."""
        if scale.numel() == 1:
            return values.mul_(scale.reshape(()))
        wide = scale.repeat_interleave(self.columns, -1)[..., : values.shape[-1]]
        for i in range(wide.shape[-2]):
            values[..., i * self.rows : (i + 1) * self.rows, :].mul_(wide[..., i : i + 1, :])
        return values
