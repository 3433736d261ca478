"""Tiny random models of every fused mixture-of-experts family that transformers knows."""

from __future__ import annotations

import importlib
import inspect
from typing import Any

import torch
import transformers
from transformers import CONFIG_MAPPING, AutoModelForCausalLM
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

# Small values for whatever of these a family's config knows.
SMALL: dict[str, Any] = {
    "vocab_size": 128, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 4,
    "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16,
    "max_position_embeddings": 256, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
    "moe_intermediate_size": 32, "shared_expert_intermediate_size": 48,
    "moe_shared_expert_intermediate_size": 48, "shared_intermediate_size": 48,
    "num_experts": 12, "num_local_experts": 12, "n_routed_experts": 12, "moe_num_experts": 12,
    "num_experts_per_tok": 4, "moe_k": 4, "moe_topk": 4, "num_shared_experts": 1,
    "n_shared_experts": 1, "moe_num_shared_experts": 1, "first_k_dense_replace": 1,
    "num_dense_layers": 1, "moe_layer_start_index": 1,
    "q_lora_rank": 32, "kv_lora_rank": 16, "qk_nope_head_dim": 16, "qk_rope_head_dim": 8,
    "v_head_dim": 16, "sliding_window": 16, "linear_num_value_heads": 4,
    "linear_num_key_heads": 2, "linear_key_head_dim": 16, "linear_value_head_dim": 16,
    "mamba_d_state": 8, "mamba_d_conv": 4, "mamba_expand": 2, "mamba_n_heads": 4,
    "mamba_d_head": 32, "mamba_n_groups": 1, "mamba_chunk_size": 8, "use_mamba_kernels": False,
}  # fmt: skip

# Beside these for configs that limit tokens to some of the groups of experts.
GROUPED: dict[str, Any] = {
    "n_group": 4, "topk_group": 2, "num_experts": 16, "num_local_experts": 16,
    "n_routed_experts": 16,
}  # fmt: skip

# What a family needs beside or instead; None leaves the family's own value.
EXTRA: dict[str, dict[str, Any]] = {
    "deepseek_v2": {"num_key_value_heads": 4, "head_dim": None},
    "deepseek_v3": {"num_key_value_heads": 4, "head_dim": None},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"] * 2},
    "jamba": {
        "attn_layer_period": 2, "attn_layer_offset": 1, "expert_layer_period": 2,
        "expert_layer_offset": 1,
    },
    "gemma4_text": {"enable_moe_block": True, "top_k_experts": 4, "num_experts": 12,
        "moe_intermediate_size": 32, "vocab_size_per_layer_input": 128,
        "hidden_size_per_layer_input": 16, "global_head_dim": 16},
    "zaya": {"num_experts_per_tok": 1},
    "kimi_linear": {"num_experts_per_tok": 4},
    "bailing_hybrid": {"num_experts_per_tok": 4},
    "dots3_note_text": {"num_key_value_heads": 4, "head_dim": 24, "swa_num_attention_heads": 4,
        "swa_num_key_value_heads": 4, "swa_q_lora_rank": 32, "swa_kv_lora_rank": 16,
        "swa_head_dim": 24, "swa_qk_nope_head_dim": 16, "swa_v_head_dim": 16,
        "index_n_heads": 4, "index_head_dim": 16, "shared_experts_intermediate_size": 48},
}  # fmt: skip


def fused_families() -> list[str]:
    """Causal-LM types of the registry whose modeling file marks fused experts."""
    found = []
    for kind, name in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.items():
        model = getattr(transformers, name if isinstance(name, str) else name[0])
        source = inspect.getsource(importlib.import_module(model.__module__))
        if "@use_experts_implementation" in source:
            found.append(kind)
    return found


def tiny_config(kind: str, **extra: Any) -> Any:
    """A small config of this type."""
    cls = CONFIG_MAPPING[kind]
    known = cls().to_dict()
    small = SMALL | (GROUPED if "n_group" in known else {})
    values = {k: v for k, v in small.items() if k in known}
    values |= EXTRA.get(kind, {}) | extra
    text = cls.sub_configs.get("text_config")
    if text is not None:
        values["text_config"] = tiny_config(text.model_type)
    return cls(**{k: v for k, v in values.items() if v is not None})


def tiny_model(kind: str, seed: int = 0, **extra: Any) -> torch.nn.Module:
    """A small model whose experts and router biases differ visibly."""
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(tiny_config(kind, **extra), dtype=torch.float32)
    generator = torch.Generator().manual_seed(seed + 1)
    with torch.no_grad():
        for p in model.parameters():
            scale = 0.08 if p.dim() >= 2 else 0.02
            p.add_(torch.randn(p.shape, generator=generator) * scale)
        for name, b in model.named_buffers():
            if "bias" in name and b.is_floating_point():  # of routers: what corrects the choice
                b.add_(torch.randn(b.shape, generator=generator) * 0.05)
    return model.eval()
