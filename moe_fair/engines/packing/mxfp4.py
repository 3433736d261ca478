"""MXFP4 as gpt-oss is published: 32 FP4 numbers in a row share a power of two.

    w = number · 2 ** (scale - 127)

A layer's experts are one tensor of blocks [E, R, C/32, 16] and one of scales [E, R, C/32]; the
model holds their transpose [E, C, R]. transformers' own function unpacks.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from moe_fair.engines.packing.fp4 import LARGEST, pack_bytes, unpack_bytes
from moe_fair.engines.packing.scheme import CODES, SCALE, PackedWeight, expect, gather
from moe_fair.engines.shards import StoredTensor

BIAS = 127
# of the power by which a group's largest number is at most 6: one less cuts it off, and may be
# nearer all the same
POWERS = (0, -1)


class MXFP4:
    """See the module."""

    name = "mxfp4"

    def __init__(self, settings: Mapping[str, Any]) -> None:
        pass

    def find(self, tensors: Sequence[StoredTensor]) -> list[PackedWeight]:
        """See `Scheme`."""
        found = []
        roles = {CODES: "_blocks", SCALE: "_scales"}
        for name, parts in gather(tensors, roles, (CODES, SCALE)).items():
            codes, scale = parts[CODES], parts[SCALE]
            if len(codes.shape) != 4 or codes.shape[-1] != 16:
                raise ValueError(
                    f"{codes.name} is {list(codes.shape)}; MXFP4 wants [experts, rows, groups, 16]"
                )
            expect(codes, ["U8"], codes.shape, "MXFP4")
            expect(scale, ["U8"], codes.shape[:-1], "MXFP4")
            experts, rows, groups, _ = codes.shape
            found.append(PackedWeight(name, (experts, groups * 32, rows), parts))
        return found

    def unpack(self, weight: PackedWeight, parts: Mapping[str, Tensor]) -> Tensor:
        """See `Scheme`; bfloat16 holds every such number."""
        from transformers.integrations.mxfp4 import convert_moe_packed_tensors

        unpacked: Tensor = convert_moe_packed_tensors(parts[CODES], parts[SCALE])
        return unpacked.contiguous()  # a transpose is multiplied in another order

    def pack(
        self, weight: PackedWeight, values: Tensor, like: Mapping[str, Tensor]
    ) -> dict[str, Tensor]:
        """See `Scheme`; of two powers of two each group takes that which is nearer."""
        groups = values.float().transpose(-2, -1).unflatten(-1, (-1, 32))  # [E, R, C/32, 32]
        largest = groups.abs().amax(-1)
        top = (largest / LARGEST).clamp_min(2.0**-BIAS).log2().ceil().clamp(-BIAS, BIAS)
        best = torch.full_like(top, torch.inf)
        codes, scale = torch.empty_like(like[CODES]), torch.empty_like(like[SCALE])
        for power in POWERS:
            tried = (top + power).clamp_min(-BIAS)
            factor = tried.exp2().unsqueeze(-1)
            packed = pack_bytes(groups / factor)
            error = (unpack_bytes(packed) * factor - groups).square().sum(-1)
            nearer = error < best
            codes[nearer] = packed[nearer]
            scale[nearer] = (tried + BIAS).to(scale.dtype)[nearer]
            best = torch.minimum(best, error)
        return {CODES: codes, SCALE: scale}
