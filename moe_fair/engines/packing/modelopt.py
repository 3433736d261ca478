"""What NVIDIA's ModelOpt publishes: FP8 of a matrix or of each row, and NVFP4.

    FP8      w = code · weight_scale
    NVFP4    w = number · weight_scale of 16 in a row (FP8) · weight_scale_2 of the matrix (float32)

A checkpoint may have both, and says by which in `hf_quant_config.json` or in its config.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from moe_fair.engines.packing import fp4
from moe_fair.engines.packing.fp8 import numbers
from moe_fair.engines.packing.scheme import (
    CODES,
    FLOATS,
    FP8_LARGEST,
    SCALE,
    SHARES,
    PackedWeight,
    expect,
    gather,
)
from moe_fair.engines.shards import StoredTensor

SHARED = "global scale"
ROLES = {CODES: ".weight", SCALE: ".weight_scale", SHARED: ".weight_scale_2"}
GROUP = 16
# what it calls what is unpacked here; which weight is which follows from its tensors
ALGORITHMS = (
    "FP8", "FP8_PER_CHANNEL_PER_TOKEN", "NVFP4", "W4A16_NVFP4", "W4A8_NVFP4_FP8", "MIXED_PRECISION",
)  # fmt: skip


class ModelOpt:
    """See the module.

    Args:
        settings: what it writes into either file.

    Raises:
        ValueError: an algorithm that is not unpacked.
    """

    def __init__(self, settings: Mapping[str, Any]) -> None:
        algorithm = str(settings.get("quant_algo") or settings["quant_method"])
        if algorithm not in ALGORITHMS:
            raise ValueError(
                f"the weights are quantised by ModelOpt ({algorithm}) and cannot be scored: only "
                f"{', '.join(ALGORITHMS)} are unpacked; prune the original model and quantise the "
                "result"
            )
        self.name = f"ModelOpt's {algorithm}"

    def find(self, tensors: Sequence[StoredTensor]) -> list[PackedWeight]:
        """See `Scheme`."""
        found = []
        for name, parts in gather(tensors, ROLES, (CODES, SCALE), ".weight").items():
            codes, scale = parts[CODES], parts[SCALE]
            expect(codes, ["U8", "F8_E4M3"], codes.shape, "ModelOpt")
            if len(codes.shape) != 2:
                raise ValueError(f"{codes.name} {list(codes.shape)} is packed, and no matrix")
            rows, columns = codes.shape
            if codes.dtype == "F8_E4M3":
                wanted: tuple[int, ...] = (
                    () if not scale.shape else (1,) if scale.numel == 1 else (rows,)
                )
                if len(scale.shape) == 2 and scale.numel == rows:
                    wanted = (rows, 1)
                expect(scale, FLOATS, wanted, "FP8")
                found.append(PackedWeight(name, codes.shape, parts))
                continue
            if SHARED not in parts:
                raise ValueError(
                    f"{codes.name} is of a packed weight, and {name.removesuffix('.weight')}"
                    f"{ROLES[SHARED]} ({SHARED}) is missing; download or copy the checkpoint again"
                )
            expect(scale, ["F8_E4M3"], (rows, -(-columns * 2 // GROUP)), "NVFP4")
            shared = parts[SHARED]
            expect(shared, ["F32"], () if not shared.shape else (1,), "NVFP4")
            found.append(PackedWeight(name, (rows, columns * 2), parts))
        return found

    def unpack(self, weight: PackedWeight, parts: Mapping[str, Tensor]) -> Tensor:
        """See `Scheme`."""
        codes, scale = parts[CODES], parts[SCALE].float()
        if SHARED not in parts:
            return numbers(codes) * (scale.view(-1, 1) if scale.numel() > 1 else scale.reshape(()))
        groups = fp4.unpack_bytes(codes).unflatten(-1, (-1, GROUP))
        return (groups * (scale * parts[SHARED]).unsqueeze(-1)).flatten(-2)

    def pack(
        self, weight: PackedWeight, values: Tensor, like: Mapping[str, Tensor]
    ) -> dict[str, Tensor]:
        """See `Scheme`; the scale of the matrix stays, which engines share between matrices."""
        values, old = values.float(), like[SCALE]
        if SHARED not in like:
            largest = values.abs().amax(-1) if old.numel() > 1 else values.abs().max()
            least = torch.finfo(torch.float32).tiny
            scale = (largest / FP8_LARGEST).clamp_min(least).view(old.shape).to(old.dtype)
            wide = scale.float()
            codes = values / (wide.view(-1, 1) if wide.numel() > 1 else wide.reshape(()))
            codes = codes.clamp_(-FP8_LARGEST, FP8_LARGEST)
            return {CODES: codes.to(like[CODES].dtype), SCALE: scale}
        groups = values.unflatten(-1, (-1, GROUP))
        largest = groups.abs().amax(-1) / (fp4.LARGEST * like[SHARED])
        codes, scale = torch.empty_like(like[CODES]), torch.empty_like(old)
        bytes_ = codes.unflatten(-1, (-1, GROUP // 2))
        best = torch.full_like(largest, torch.inf)
        # with its old scale a group whose weights hardly moved keeps most of its codes
        scales = [(largest * share).clamp(2.0**-9, FP8_LARGEST).to(old.dtype) for share in SHARES]
        for tried in (*scales, old):
            factor = (tried.float() * like[SHARED]).unsqueeze(-1)
            packed = fp4.pack_bytes(groups / factor)
            error = (fp4.unpack_bytes(packed) * factor - groups).square().sum(-1)
            nearer = error < best
            bytes_[nearer] = packed[nearer]
            scale.view(torch.uint8)[nearer] = tried.view(torch.uint8)[nearer]
            best = torch.minimum(best, error)
        return {CODES: codes, SCALE: scale}
