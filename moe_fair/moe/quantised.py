"""Checkpoints whose weights are packed: which of them can be scored, and how they are loaded.

Scores need weights that multiply and have gradients, so a checkpoint is served where transformers
can unpack it on load, on any device: MXFP4 (gpt-oss) and FP8 with block scales (DeepSeek, Qwen).
The cut itself copies the packed bytes of the experts that stay, scales with them; the result is
packed as the original is.

A config does not always admit it: ModelOpt writes `hf_quant_config.json` beside it, and some say
nothing. Weights that were scored unscaled would be wrong without a sign, so they are refused.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from transformers import FineGrainedFP8Config, Mxfp4Config

from moe_fair.engines.shards import StoredTensor

UNPACKED = {"mxfp4": Mxfp4Config, "fp8": FineGrainedFP8Config}
BESIDE = "hf_quant_config.json"  # where ModelOpt says it
# data types that no weight has which can multiply as it is
CODES = ("F8_E4M3", "F8_E5M2", "F8_E8M0", "U8", "I8", "F4")
# what scale tensors of the packers are called
SCALES = (
    "scale", "scale_inv", "scales", "scale_2", "weight_scale", "weight_scale_inv", "input_scale",
    "qweight", "qzeros", "weight_packed", "weight_shape", "zero_point", "absmax",
)  # fmt: skip


def method(config: Any) -> str | None:
    """How the weights are packed, in transformers' word for it; None where they are not."""
    for part in (config, config.get_text_config()):
        for name in ("quantization_config", "compression_config"):
            stored = getattr(part, name, None)
            if stored:
                found = stored.get("quant_method") if isinstance(stored, dict) else None
                found = found or getattr(stored, "quant_method", None) or name.split("_")[0]
                return str(getattr(found, "value", found))
    return None


def packed(config: Any) -> bool:
    """The weights are quantised, as their config says."""
    return method(config) is not None


def unpacking(config: Any) -> dict[str, Any]:
    """Arguments of `from_pretrained` by which packed weights are unpacked on load.

    Raises:
        ValueError: transformers cannot do that with weights packed like these.
    """
    how = method(config)
    if how is None:
        return {}
    if how not in UNPACKED:
        raise ValueError(_cannot(how))
    return {"quantization_config": UNPACKED[how](dequantize=True)}


def check_admitted(
    folder: Path, config: Any, tensors: Sequence[StoredTensor], places: Mapping[str, str]
) -> None:
    """Packed weights are packed as the config says, and in one way where they become one tensor.

    Args:
        tensors: of the checkpoint.
        places: name, as stored, -> in the model, of those that have a place there.

    Raises:
        ValueError: they are packed in a way that cannot be unpacked, or that nothing tells.
    """
    if packed(config):
        return _check_alike(tensors, places)
    if (folder / BESIDE).is_file():
        raise ValueError(_cannot(f"{_beside(folder / BESIDE)}, says {BESIDE}"))
    for t in tensors:
        in_codes = t.name in places and t.dtype in CODES and t.name.endswith("weight")
        scale = t.name not in places and t.name.rpartition(".")[2] in SCALES
        if in_codes or scale:
            raise ValueError(
                f"{t.name} ({t.dtype}) is of packed weights, and config.json does not say how they "
                "are packed (no quantization_config); prune the original model, or copy what says "
                "it into config.json"
            )


def _check_alike(tensors: Sequence[StoredTensor], places: Mapping[str, str]) -> None:
    """transformers stacks a layer's experts before it unpacks them, or does neither."""
    seen: dict[str, StoredTensor] = {}
    for t in tensors:
        if t.name not in places or not t.name.endswith("weight"):
            continue
        first = seen.setdefault(places[t.name], t)
        if first.dtype != t.dtype:
            raise ValueError(
                f"{first.name} is {first.dtype} and {t.name} {t.dtype}: transformers cannot unpack "
                "experts of which some are packed; prune the original model and quantise the result"
            )


def _beside(file: Path) -> str:
    """The algorithm that ModelOpt names."""
    try:
        return str(json.loads(file.read_text())["quantization"]["quant_algo"])
    except (OSError, ValueError, KeyError, TypeError):
        return "by ModelOpt"


def _cannot(how: str) -> str:
    return (
        f"the weights are quantised ({how}) and cannot be scored: only {' and '.join(UNPACKED)} "
        "weights are unpacked on load; prune the original model and quantise the result"
    )
