"""Which device and data type a run computes on."""

from __future__ import annotations

import os

import torch

from moe_fair.core.quote import first_line

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def pick_device(device: str) -> torch.device:
    """The device that a name or `auto` stands for.

    Raises:
        ValueError: no such device here, one that has no float64, or one for several processes.
    """
    if device == "auto" and os.environ.get("ACCELERATE_USE_CPU"):
        return torch.device("cpu")  # accelerate launch --cpu
    if device == "auto":
        accelerator = (
            torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
        )
        if accelerator is None or _no_float64(accelerator) is not None:
            return torch.device("cpu")
        return accelerator
    try:
        found = torch.device(device)
    except RuntimeError as e:
        raise ValueError(f"--device {device}: {first_line(e)}") from e
    if found.type == "cuda" and not torch.cuda.is_available():
        raise ValueError(f"--device {device}: torch sees no CUDA device here; use --device cpu")
    if found.type == "cuda" and (found.index or 0) >= (count := torch.cuda.device_count()):
        raise ValueError(
            f"--device {device}: torch sees {count} CUDA devices here, the last of them "
            f"cuda:{count - 1}"
        )
    if (reason := _no_float64(found)) is not None:
        raise ValueError(
            f"--device {device}: statistics are summed in float64, which it does not give here "
            f"({reason}); use --device cpu"
        )
    together = int(os.environ.get("LOCAL_WORLD_SIZE") or os.environ.get("WORLD_SIZE") or 1)
    if found.type != "cpu" and found.index is not None and together > 1:
        raise ValueError(
            f"--device {device} is one device for {together} processes; give --device "
            f"{found.type}, and each takes its own"
        )
    return found


def _no_float64(device: torch.device) -> str | None:
    """What torch says when it is asked for a float64 number there; None where it gives one."""
    if device.type in ("cpu", "cuda"):
        return None
    try:
        torch.ones((), dtype=torch.float64, device=device).sum().item()
    except Exception as e:  # a backend that is not there raises whatever it meets first
        return first_line(e)
    return None


def pick_dtype(dtype: str, device: torch.device) -> torch.dtype | str:
    """The torch data type that a name stands for; see `Checkpoint.load`.

    Raises:
        ValueError: an unknown name.
    """
    if dtype == "checkpoint" or (dtype == "auto" and device.type != "cpu"):
        return "auto"
    if dtype == "auto":
        return torch.float32
    if dtype not in DTYPES:
        raise ValueError(f"--dtype {dtype!r} is none of auto, checkpoint, {', '.join(DTYPES)}")
    return DTYPES[dtype]
