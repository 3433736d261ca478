"""What a result's weights can become on the way out: bfloat16, block FP8, INT4 in groups.

Of each target what its readers (transformers, vLLM) want to find: names, shapes and settings.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from moe_fair.engines.packing.block_fp8 import SQUARE, BlockFP8
from moe_fair.engines.packing.compressed import SHAPE, WORDS, CompressedTensors
from moe_fair.engines.packing.scheme import CODES, SCALE, PackedWeight, Scheme
from moe_fair.engines.shards import StoredTensor
from moe_fair.engines.stored_values import TORCH

SIDE = 128  # both sides of a matrix are multiples of it: squares of FP8, groups and tiles of INT4
FP8 = {
    "quant_method": "fp8", "fmt": "e4m3", "activation_scheme": "dynamic",
    "weight_block_size": list(SQUARE),
}  # fmt: skip
W4A16 = {
    "quant_method": "compressed-tensors", "format": WORDS, "quantization_status": "compressed",
    "config_groups": {"group_0": {"targets": ["Linear"], "format": WORDS, "weights": {
        "num_bits": 4, "type": "int", "symmetric": True, "strategy": "group", "group_size": SIDE,
        "dynamic": False,
    }}},
}  # fmt: skip
Rows = tuple[int, ...]


def _plain(name: str, shape: Rows) -> dict[str, StoredTensor]:
    return {CODES: StoredTensor(name, "BF16", shape, ())}


def _squares(name: str, shape: Rows) -> dict[str, StoredTensor]:
    rows, columns = shape
    scale = StoredTensor(f"{name}_scale_inv", "F32", (-(-rows // SIDE), -(-columns // SIDE)), ())
    return {CODES: StoredTensor(name, "F8_E4M3", shape, ()), SCALE: scale}


def _words(name: str, shape: Rows) -> dict[str, StoredTensor]:
    rows, columns = shape
    return {
        CODES: StoredTensor(f"{name}_packed", "I32", (rows, columns // 8), ()),
        SCALE: StoredTensor(f"{name}_scale", "BF16", (rows, columns // SIDE), ()),
        SHAPE: StoredTensor(f"{name}_shape", "I64", (2,), ()),
    }


@dataclass(frozen=True)
class Target:
    """One of them.

    Attributes:
        name: as --save-as has it.
        scheme: that packs; None where weights become plain bfloat16.
        settings: `quantization_config`, but for `plain`.
        plain: its key for the names of modules that are not packed.
        parts: (name, shape) of a weight -> its stored tensors, which have no bytes yet.
    """

    name: str
    scheme: Scheme | None
    settings: Mapping[str, Any]
    plain: str
    parts: Callable[[str, Rows], dict[str, StoredTensor]]

    def weight(self, name: str, shape: Rows) -> PackedWeight:
        """A weight as it will be stored."""
        return PackedWeight(name, shape, self.parts(name, shape))

    def pack(self, weight: PackedWeight, values: Tensor) -> dict[str, Tensor]:
        """Role -> tensor, of all parts."""
        if self.scheme is None:
            return {CODES: values.to(torch.bfloat16)}
        like = {
            role: torch.ones(t.shape, dtype=TORCH[t.dtype], device=values.device)
            for role, t in weight.parts.items()
        }
        if SHAPE in like:
            like[SHAPE] = torch.tensor(weight.shape)
        return {**like, **self.scheme.pack(weight, values, like)}

    def unpack(self, weight: PackedWeight, parts: Mapping[str, Tensor]) -> Tensor:
        """The numbers that it then has."""
        return parts[CODES] if self.scheme is None else self.scheme.unpack(weight, parts)


def target(name: str) -> Target:
    """By the name that --save-as has.

    Raises:
        ValueError: compressed-tensors is not installed, and is needed.
    """
    if name == "fp8":
        return Target(name, BlockFP8(FP8), FP8, "modules_to_not_convert", _squares)
    if name == "w4a16":
        return Target(name, CompressedTensors(W4A16), W4A16, "ignore", _words)
    assert name == "bf16", name
    return Target(name, None, {}, "", _plain)
