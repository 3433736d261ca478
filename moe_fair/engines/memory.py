"""How much memory is free, and what of it may be used."""

from __future__ import annotations

import psutil
import torch

from moe_fair.engines.oom import release

# of the free memory: the rest is for activations, logits and whatever else runs
USABLE = 0.7


def free_memory(device: torch.device, sharers: int = 1) -> int:
    """Bytes that can still be allocated on the device; of main memory one of `sharers` parts."""
    if device.type == "cuda":
        release()  # a finished stage's blocks, which torch keeps, are free too
        return torch.cuda.mem_get_info(device)[0]
    return psutil.virtual_memory().available // sharers


def usable_memory(device: torch.device, sharers: int = 1) -> int:
    """What of it weights may take."""
    return int(free_memory(device, sharers) * USABLE)
