"""Tiny random models of every fused mixture-of-experts family that transformers knows."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import CONFIG_MAPPING, AutoConfig
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from moe_fair.engines.auto import auto_class

LARGEST = 10_000_000  # parameters; a config that is not small by mistake must not be built

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

# Beside these for latent attention, whose rotary part is what `head_dim` means.
LATENT: dict[str, Any] = {"head_dim": 8, "num_key_value_heads": 4}

# Beside or instead of these for the other towers of a multimodal model.
TOWER: dict[str, Any] = {
    "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "depth": 1,
    "num_heads": 2, "num_attention_heads": 2, "num_key_value_heads": 2, "head_dim": 16,
    "out_hidden_size": 64, "adapter_in_dim": 32, "adapter_out_dim": 64, "adapter_input_size": 32,
    "downsample_hidden_size": 16, "num_local_experts": 4, "moe_intermediate_size": 16,
    "num_position_embeddings": 16, "deepstack_visual_indexes": [0], "embed_dim": 32,
}  # fmt: skip

# What a family needs beside or instead; None leaves the family's own value.
EXTRA: dict[str, dict[str, Any]] = {
    "lfm2_moe": {"layer_types": ["conv", "full_attention"] * 2},
    "granitemoehybrid": {"layer_types": ["linear_attention", "full_attention"] * 2},
    "glm_moe_dsa": {"n_group": 1, "topk_group": 1, "head_dim": 8, "index_n_heads": 4,
        "index_head_dim": 16, "indexer_types": ["full"] * 4},
    "jamba": {
        "attn_layer_period": 2, "attn_layer_offset": 1, "expert_layer_period": 2,
        "expert_layer_offset": 1,
    },
    "llama4": {"vision_feature_layer": -1},
    "llama4_vision_model": {
        "image_size": 28, "patch_size": 14, "vision_output_dim": 32, "projector_input_dim": 32,
        "projector_output_dim": 32,
    },
    "gemma4_text": {"enable_moe_block": True, "top_k_experts": 4, "num_experts": 12,
        "moe_intermediate_size": 32, "vocab_size_per_layer_input": 128,
        "hidden_size_per_layer_input": 16, "global_head_dim": 16},
    "dots3_note_vision_encoder": {"pyramid_num_routed": [4]},  # one layer, with experts
    "phimoe": {"num_experts_per_tok": 2},  # what its router does whatever the config says
    "beam": {"mlp_layer_types": ["dense", "sparse"] * 2},
    "nemotron_h": {
        "layers_block_type": ["moe", "linear_attention", "moe", "full_attention"],
        "chunk_size": 8, "ssm_state_size": 8, "mamba_num_heads": 8, "mamba_head_dim": 16,
    },
    "deepseek_v4": {"mlp_layer_types": ["hash_moe", "moe"] * 2},
    "doge": {"is_moe": True, "num_experts": 16},
    "jetmoe": {"kv_channels": 16},
    "longcat_flash": {
        "num_layers": 2, "ffn_hidden_size": 96, "expert_ffn_hidden_size": 32, "zero_expert_num": 2,
    },
    "zaya": {"num_experts_per_tok": 1},
    "glm4v_moe_text": {"rope_parameters": {
        "rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": 0.5,
        "mrope_section": [2, 1, 1],
    }},
    "ernie4_5_vl_moe_text": {
        "moe_intermediate_size": [32, 16], "rope_parameters": {
            "rope_type": "default", "rope_theta": 10000.0, "mrope_section": [3, 3, 2],
        },
    },
    "qwen4_exp_text": {
        "layer_types": ["linear_attention", "full_attention"] * 2, "indexer_n_heads": 2,
        "indexer_kv_heads": 1, "indexer_head_dim": 16, "indexer_budget": 32,
        "indexer_compress_ratio": 4, "hc_lowrank": 8,
    },
    "kimi_linear": {
        "num_experts_per_tok": 4, "layer_types": ["linear_attention", "full_attention"] * 2,
        "linear_head_dim": 16, "linear_num_heads": 4,
    },
    "bailing_hybrid": {
        "num_experts": 16, "num_experts_per_tok": 4, "layer_group_size": 2, "head_dim": 16,
        "n_group": 4, "topk_group": 2,
    },
    "dots3_note_text": {"num_key_value_heads": 4, "head_dim": 24, "swa_num_attention_heads": 4,
        "swa_num_key_value_heads": 4, "swa_q_lora_rank": 32, "swa_kv_lora_rank": 16,
        "swa_head_dim": 24, "swa_qk_nope_head_dim": 16, "swa_v_head_dim": 16,
        "index_n_heads": 4, "index_head_dim": 16, "shared_experts_intermediate_size": 48},
}  # fmt: skip


@functools.cache
def fused_families() -> list[str]:
    """Causal-LM types of the registry whose modeling file marks fused experts.

    The files are read: to import all 200 takes seconds, in every process of a test run.
    """
    files = (Path(transformers.__file__).parent / "models").glob("*/modeling_*.py")
    fused = "\n".join(s for f in files if "@use_experts_implementation" in (s := f.read_text()))
    return [
        kind
        for kind, name in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.items()
        if f"class {name if isinstance(name, str) else name[0]}(" in fused
    ]


def tiny_config(kind: str, **extra: Any) -> Any:
    """A small config of this type; a multimodal one with small towers."""
    cls = CONFIG_MAPPING[kind]
    values = _known(cls, SMALL) | EXTRA.get(kind, {}) | extra
    for name, part in cls.sub_configs.items():
        if name in extra:
            continue
        if part is AutoConfig and getattr(cls(), name, None) is not None:
            part = type(getattr(cls(), name))  # the type that it has where nothing is said
        if name == "text_config":
            values[name] = tiny_config(
                part.model_type, **{k: v for k, v in extra.items() if k == "vocab_size"}
            )
        elif isinstance(part, type) and part is not AutoConfig:
            values[name] = part(**_known(part, TOWER) | EXTRA.get(part.model_type, {}))
    return cls(**{k: v for k, v in values.items() if v is not None})


def _known(cls: Any, small: dict[str, Any]) -> dict[str, Any]:
    """Of the small values those that this config class knows."""
    known = cls().to_dict()
    if small is SMALL:
        small = small | (GROUPED if "n_group" in known else {})
        small |= LATENT if "kv_lora_rank" in known else {}
    return {k: v for k, v in small.items() if k in known}


def tiny_model(kind: str, seed: int = 0, **extra: Any) -> torch.nn.Module:
    """A small model whose experts and router biases differ visibly."""
    config = tiny_config(kind, **extra)
    auto = auto_class(config)
    with torch.device("meta"):
        size = sum(p.numel() for p in auto.from_config(config).parameters())
    assert size <= LARGEST, f"{kind} has {size:,} parameters: make it smaller in EXTRA"
    torch.manual_seed(seed)
    model = auto.from_config(config, dtype=torch.float32)
    generator = torch.Generator().manual_seed(seed + 1)
    with torch.no_grad():
        for p in model.parameters():
            scale = 0.08 if p.dim() >= 2 else 0.02
            p.add_(torch.randn(p.shape, generator=generator) * scale)
        for name, b in model.named_buffers():
            if "bias" in name and b.is_floating_point():  # of routers: what corrects the choice
                b.add_(torch.randn(b.shape, generator=generator) * 0.05)
    return model.eval()
