"""Checkpoints whose weights are packed: which of them can be scored, and how they are loaded.

Scores need weights that multiply and have gradients, so a checkpoint is served where transformers
can unpack it on load, on any device: MXFP4 (gpt-oss) and FP8 with block scales (DeepSeek, Qwen).
The cut itself copies the packed bytes of the experts that stay, scales with them; the result is
packed as the original is.
"""

from __future__ import annotations

from typing import Any

from transformers import FineGrainedFP8Config, Mxfp4Config

UNPACKED = {"mxfp4": Mxfp4Config, "fp8": FineGrainedFP8Config}


def method(config: Any) -> str | None:
    """How the weights are packed, in transformers' word for it; None where they are not."""
    for part in (config, config.get_text_config()):
        stored = getattr(part, "quantization_config", None)
        if stored:
            found = stored.get("quant_method") if isinstance(stored, dict) else stored.quant_method
            return str(getattr(found, "value", found))
    return None


def unpacking(config: Any) -> dict[str, Any]:
    """Arguments of `from_pretrained` by which packed weights are unpacked on load.

    Raises:
        ValueError: transformers cannot do that with weights packed like these.
    """
    how = method(config)
    if how is None:
        return {}
    if how not in UNPACKED:
        raise ValueError(
            f"the weights are quantised ({how}) and cannot be scored: only "
            f"{' and '.join(UNPACKED)} weights are unpacked on load; prune the original model and "
            "quantise the result"
        )
    return {"quantization_config": UNPACKED[how](dequantize=True)}
