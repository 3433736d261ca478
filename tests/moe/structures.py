"""Families of one structure: what is checked of one in full need not be of the others every time.

Two are of one structure where their routers run the same code and their blocks agree in kind, in
the flags of their experts, in the axes that are cut and in having groups. `-m nightly` checks
everything of all of them, and that this table is what the models say.
"""

from __future__ import annotations

import inspect
import re
from typing import Any

from moe_fair.moe.blocks import find_blocks

FLAGS = ("has_gate", "has_bias", "is_transposed", "is_concatenated", "has_post_expert_norm")
# the one that is checked in full -> those of its structure
ALIKE: dict[str, tuple[str, ...]] = {
    "afmoe": (),
    "aria_text": (),
    "deepseek_v3": (
        "axk1",
        "bailing_hybrid",
        "deepseek_v32",
        "dots1",
        "dots3_note",
        "dots3_note_text",
        "exaone_moe",
        "glm4_moe",
        "glm4_moe_lite",
        "hy_v4",
        "mimo_v2_flash",
        "solar_open",
    ),
    "axk2": (),
    "beam": (),
    "cohere2_moe": (),
    "deepseek_v2": (),
    "deepseek_v4": (),
    "ernie4_5_moe": (),
    "qwen2_moe": (
        "flex_olmo",
        "mellum",
        "olmoe",
        "qwen3_moe",
        "qwen3_next",
        "qwen4_exp",
        "qwen4_exp_text",
    ),
    "flint": (),
    "gemma4": ("gemma4_text",),
    "glm_moe_dsa": ("kimi_linear",),
    "gpt_oss": (),
    "granitemoe": (
        "granitemoe_swa",
        "granitemoehybrid",
        "granitemoeshared",
    ),
    "hunyuan_v1_moe": (),
    "hy_v3": (),
    "inkling2_text": (),
    "jamba": (),
    "kolibri1": (),
    "laguna": (),
    "lfm2_moe": (),
    "mixtral": ("minimax",),
    "minimax_m2": (),
    "minimax_m3_vl_text": (),
    "nemotron_h": (),
    "phimoe": (),
    "qwen3_5_moe": ("qwen3_5_moe_text",),
}
# one of each kind of experts module, for what goes by nothing else
EXPERTS = ("mixtral", "aria_text", "gpt_oss", "nemotron_h")


def structure(model: Any) -> frozenset[tuple[Any, ...]]:
    """What decides how the blocks of a model are watched, routed and cut."""
    return frozenset(
        (
            re.sub(r"\s+", " ", inspect.getsource(type(b.router).forward)),
            flags(b.experts),
            frozenset((tensor, dim) for _, tensor, dim in b.routed),
            b.n_group > 1,
            b.table is not None,
            type(b).__name__,
        )
        for b in find_blocks(model)
    )


def flags(experts: Any) -> tuple[Any, ...]:
    """The flags of the contract of `use_experts_implementation`."""
    return tuple(getattr(experts, f, None) for f in FLAGS)
