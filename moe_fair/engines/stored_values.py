"""The numbers of stored tensors, in memory."""

from __future__ import annotations

import torch
from torch import Tensor

from moe_fair.engines.shards import StoredTensor

TORCH = {
    "BOOL": torch.bool, "U8": torch.uint8, "I8": torch.int8, "F8_E5M2": torch.float8_e5m2,
    "F8_E4M3": torch.float8_e4m3fn, "F8_E8M0": torch.float8_e8m0fnu, "I16": torch.int16,
    "F16": torch.float16, "BF16": torch.bfloat16, "I32": torch.int32, "F32": torch.float32,
    "I64": torch.int64, "F64": torch.float64,
}  # fmt: skip

NAMES = {dtype: name for name, dtype in TORCH.items()}


def read_tensor(t: StoredTensor) -> Tensor:
    """A stored tensor in memory, whatever pieces it is made of.

    Raises:
        ValueError: a file has ended early.
    """
    data = bytearray(t.bytes)
    view, done = memoryview(data), 0
    for piece in t.pieces:
        with piece.file.open("rb") as f:
            f.seek(piece.start)
            if f.readinto(view[done : done + piece.length]) != piece.length:
                raise ValueError(f"{piece.file} ended before {t.name} did; download it again")
        done += piece.length
    dtype = TORCH[t.dtype]
    if not data:
        return torch.empty(t.shape, dtype=dtype)
    return torch.frombuffer(data, dtype=dtype).view(t.shape)
