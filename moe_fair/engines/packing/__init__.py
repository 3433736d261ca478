"""Packed weights: FP8, FP4, INT4 and INT8, unpacked as they are read and packed when written.

A registry of schemes, one file each. What a checkpoint's config (or ModelOpt's file beside it) says
chooses one; nothing is read before it is known.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from moe_fair.engines.packing.block_fp8 import BlockFP8
from moe_fair.engines.packing.checkpoint import LazyWeight, Packing, find_packing
from moe_fair.engines.packing.compressed import CompressedTensors
from moe_fair.engines.packing.gptq import AWQ, GPTQ
from moe_fair.engines.packing.modelopt import ModelOpt
from moe_fair.engines.packing.mxfp4 import MXFP4
from moe_fair.engines.packing.scheme import PackedWeight, Scheme

__all__ = ["LazyWeight", "PackedWeight", "Packing", "Scheme", "find_packing", "scheme_of"]

QUANTISED = ("quantization_config", "compression_config")  # where a config says it
BESIDE = "hf_quant_config.json"  # where ModelOpt says it
# what `quant_method` says -> the scheme
SCHEMES: dict[str, Any] = {
    "fp8": BlockFP8, "mxfp4": MXFP4, "compressed-tensors": CompressedTensors,
    "modelopt": ModelOpt, "modelopt_fp4": ModelOpt, "gptq": GPTQ, "awq": AWQ,
}  # fmt: skip


def settings_of(config: Mapping[str, Any], folder: Path) -> Mapping[str, Any] | None:
    """How the weights are packed, as the config of a model says it, or ModelOpt's file beside it.

    Args:
        config: `config.json`.
    """
    inner = config.get("text_config")
    for part in (config, inner if isinstance(inner, dict) else {}):
        for name in QUANTISED:
            if isinstance(part.get(name), dict) and part[name]:
                method = part[name].get("quant_method") or (
                    "compressed-tensors" if name == "compression_config" else "quantization"
                )
                return {**part[name], "quant_method": method}
    if (folder / BESIDE).is_file():
        try:
            stored = json.loads((folder / BESIDE).read_text())["quantization"]
            if stored.get("quant_algo") is None:  # of the cache alone
                return None
            return {**stored, "quant_method": "modelopt"}
        except (OSError, ValueError, KeyError, TypeError) as e:
            raise ValueError(f"{BESIDE} says nothing that can be read; download it again") from e
    return None


def scheme_of(config: Mapping[str, Any], folder: Path) -> Scheme | None:
    """The scheme of a checkpoint; None where its weights are not packed.

    Raises:
        ValueError: no scheme that is known, or settings that it does not take.
    """
    settings = settings_of(config, folder)
    if settings is None:
        return None
    method = str(settings["quant_method"])
    if method not in SCHEMES:
        raise ValueError(
            f"the weights are quantised ({method}) and cannot be scored: only {', '.join(SCHEMES)} "
            "weights are unpacked; prune the original model and quantise the result"
        )
    scheme: Scheme = SCHEMES[method](settings)
    return scheme
