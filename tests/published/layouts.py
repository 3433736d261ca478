"""Layouts of models as they are published: facts of their configs and files, with small numbers.

What is asserted of each is in `test_published.py`. Code files hold a line that would be seen if it
ran: only that of tokenizers may.
"""

from __future__ import annotations

from typing import Any

import torch
from published.make import WORDS, Layout, Tensors

# code that must never run: the stock class serves
MODEL_CODE = 'raise RuntimeError("code of the model ran")\n'
LICENSE = "Permission is granted to try this.\n"
CARD = "---\nlicense: apache-2.0\n---\n# The base model\n"

ATTENTION = {
    "hidden_size": 64, "num_hidden_layers": 3, "num_attention_heads": 4, "num_key_value_heads": 2,
    "vocab_size": WORDS, "max_position_embeddings": 512, "rms_norm_eps": 1e-6,
    "rope_theta": 10000.0, "tie_word_embeddings": False, "torch_dtype": "bfloat16",
    "transformers_version": "4.46.0", "use_cache": True, "bos_token_id": 0, "eos_token_id": 0,
}  # fmt: skip
LATENT = ATTENTION | {
    "num_key_value_heads": 4, "q_lora_rank": None, "kv_lora_rank": 16, "qk_nope_head_dim": 16,
    "qk_rope_head_dim": 8, "v_head_dim": 16, "intermediate_size": 96, "moe_intermediate_size": 32,
    "n_routed_experts": 8, "n_shared_experts": 1, "num_experts_per_tok": 2, "n_group": 1,
    "topk_group": 1, "first_k_dense_replace": 1, "moe_layer_freq": 1, "hidden_act": "silu",
    "attention_bias": False, "attention_dropout": 0.0, "initializer_range": 0.02,
    "pretraining_tp": 1, "aux_loss_alpha": 0.001, "seq_aux": True, "ep_size": 1,
}  # fmt: skip


def code(config: str, model: str, prefix: str) -> dict[str, Any]:
    """An `auto_map` and the files that it names."""
    return {
        "AutoConfig": f"configuration_{prefix}.{config}",
        "AutoModel": f"modeling_{prefix}.{model.replace('ForCausalLM', 'Model')}",
        "AutoModelForCausalLM": f"modeling_{prefix}.{model}",
    }


def code_files(prefix: str) -> dict[str, str]:
    """Files of model code."""
    return {f"configuration_{prefix}.py": MODEL_CODE, f"modeling_{prefix}.py": MODEL_CODE}


def fp8(block: int, keep: tuple[str, ...]) -> Any:
    """Every matrix but those named in FP8 with a scale for each square, as DeepSeek publishes."""

    def stored(tensors: Tensors, config: dict[str, Any]) -> Tensors:
        found: Tensors = {}
        for name, t in tensors.items():
            if t.dim() != 2 or (not name.endswith("proj.weight") and "_proj" not in name):
                found[name] = t
                continue
            if any(k in name for k in keep):
                found[name] = t
                continue
            rows, columns = (-(-s // block) for s in t.shape)
            wide = torch.zeros(rows * block, columns * block)
            wide[: t.shape[0], : t.shape[1]] = t.float()
            tiles = wide.view(rows, block, columns, block)
            scale = tiles.abs().amax((1, 3)).clamp(min=1e-8) / 448
            packed = (tiles / scale[:, None, :, None]).view_as(wide)
            packed = packed[: t.shape[0], : t.shape[1]].contiguous()
            found[name] = packed.to(torch.float8_e4m3fn)
            found[f"{name}_scale_inv"] = scale
        return found

    return stored


FP8 = {
    "quant_method": "fp8", "fmt": "e4m3", "activation_scheme": "dynamic",
    "weight_block_size": [16, 16],
}  # fmt: skip

INT4 = {
    "num_bits": 4, "type": "int", "symmetric": True, "strategy": "group", "group_size": 16,
}  # fmt: skip
FP8_ROWS = {
    "num_bits": 8, "type": "float", "symmetric": True, "strategy": "channel", "dynamic": False,
}  # fmt: skip

QWEN_MOE = ATTENTION | {
    "hidden_act": "silu", "intermediate_size": 96, "moe_intermediate_size": 32, "num_experts": 8,
    "num_experts_per_tok": 2, "decoder_sparse_step": 1, "mlp_only_layers": [],
    "norm_topk_prob": True, "output_router_logits": False, "router_aux_loss_coef": 0.001,
    "sliding_window": None, "use_sliding_window": False, "attention_dropout": 0.0,
    "initializer_range": 0.02, "max_window_layers": 3,
}  # fmt: skip

TOKENIZER_CODE = '''"""A tokenizer that is code, as Kimi and Moonlight publish theirs."""
import json
import os

from transformers import PreTrainedTokenizer

from .word_pieces import pieces


class TikTokenTokenizer(PreTrainedTokenizer):
    vocab_files_names = {"vocab_file": "tiktoken.model"}
    model_input_names = ["input_ids", "attention_mask"]

    def __init__(self, vocab_file, **kwargs):
        with open(vocab_file, encoding="utf-8") as f:
            self.words = json.load(f)
        self.vocab_file = vocab_file
        self.ids = {w: i for i, w in enumerate(self.words)}
        super().__init__(**kwargs)

    @property
    def vocab_size(self):
        return len(self.words)

    def get_vocab(self):
        return {**self.ids, **self.added_tokens_encoder}

    def _tokenize(self, text, **kwargs):
        return pieces(text)

    def _convert_token_to_id(self, token):
        return self.ids.get(token, 1)

    def _convert_id_to_token(self, index):
        return self.words[index]

    def convert_tokens_to_string(self, tokens):
        return "".join(tokens)

    def save_vocabulary(self, save_directory, filename_prefix=None):
        out = os.path.join(save_directory, "tiktoken.model")
        with open(out, "w", encoding="utf-8") as f:
            json.dump(self.words, f)
        return (out,)
'''
PIECES_CODE = '''"""What the tokenizer imports."""


def pieces(text):
    return [text[i : i + 1] for i in range(len(text))]
'''


def tiktoken_files() -> dict[str, str]:
    """A tokenizer with code of its own and what it imports."""
    import json

    words = ["[EOS]", "[UNK]", *map(chr, range(32, 127)), "\n", "\t"]
    settings = {
        "tokenizer_class": "TikTokenTokenizer", "eos_token": "[EOS]", "pad_token": "[EOS]",
        "unk_token": "[UNK]", "model_max_length": 131072,
        "auto_map": {"AutoTokenizer": ["tokenization_kimi.TikTokenTokenizer", None]},
    }  # fmt: skip
    return {
        "tokenization_kimi.py": TOKENIZER_CODE, "word_pieces.py": PIECES_CODE,
        "tiktoken.model": json.dumps(words), "tokenizer_config.json": json.dumps(settings),
    }  # fmt: skip


def _hashed(**more: Any) -> Layout:
    """DeepSeek V4: tables of token ids in the first layers, names that no other family has."""
    return Layout(
        config=ATTENTION
        | {
            "architectures": ["DeepseekV4ForCausalLM"],
            "model_type": "deepseek_v4",
            "num_hidden_layers": 5,
            "num_key_value_heads": 1,
            "head_dim": 16,
            "qk_rope_head_dim": 8,
            "q_lora_rank": 32,
            "o_groups": 2,
            "o_lora_rank": 16,
            "sliding_window": 16,
            "compress_ratios": [0, 0, 4, 128, 4, 0],
            "compress_rope_theta": 160000,
            "index_head_dim": 16,
            "index_n_heads": 4,
            "index_topk": 32,
            "hc_eps": 1e-06,
            "hc_mult": 4,
            "hc_sinkhorn_iters": 20,
            "hidden_act": "silu",
            "moe_intermediate_size": 32,
            "n_routed_experts": 8,
            "n_shared_experts": 1,
            "norm_topk_prob": True,
            "num_experts_per_tok": 2,
            "num_hash_layers": 3,
            "num_nextn_predict_layers": 1,
            "routed_scaling_factor": 1.5,
            "scoring_func": "sqrtsoftplus",
            "swiglu_limit": 10.0,
            "topk_method": "noaux_tc",
            "attention_bias": False,
            "attention_dropout": 0.0,
            "initializer_range": 0.02,
            "rope_scaling": {
                "beta_fast": 32,
                "beta_slow": 1,
                "factor": 16,
                "original_max_position_embeddings": 32,
                "type": "yarn",
            },
        },
        stored=_hash_tables,
        names=(
            "embed.weight",
            "head.weight",
            "norm.weight",
            "hc_head_fn",
            "layers.0.attn.wq_a.weight",
            "layers.0.attn.attn_sink",
            "layers.0.attn_norm.weight",
            "layers.0.hc_attn_base",
            "layers.0.ffn.gate.tid2eid",
            "layers.0.ffn.experts.0.w1.weight",
            "layers.2.attn.indexer.wq_b.weight",
            "layers.2.attn.indexer.compressor.wkv.weight",
            "layers.3.ffn.gate.bias",
            "layers.3.ffn.shared_experts.w2.weight",
        ),
        files={"inference/model.py": MODEL_CODE, "encoding/encoding_dsv4.py": MODEL_CODE},
        unrepaired="several streams",
        **more,
    )


def _layouts() -> list[Layout]:
    deepseek = "model.layers.1.mlp.experts.7.gate_proj.weight"
    found = [
        Layout(
            "Qwen/Qwen1.5-MoE-A2.7B-Chat",
            QWEN_MOE
            | {
                "architectures": ["Qwen2MoeForCausalLM"],
                "model_type": "qwen2_moe",
                "shared_expert_intermediate_size": 48,
                "norm_topk_prob": False,
            },
            names=(
                "model.layers.0.mlp.experts.7.down_proj.weight",
                "model.layers.0.mlp.shared_expert_gate.weight",
            ),
            files={
                "LICENSE": LICENSE,
                "README.md": CARD,
                "merges.txt": "a b\n",
                "vocab.json": "{}",
                "generation_config.json": '{"do_sample": true}',
            },
            travels=("LICENSE", "merges.txt", "vocab.json", "generation_config.json"),
        ),
        Layout(
            "Qwen/Qwen3-30B-A3B",
            QWEN_MOE
            | {
                "architectures": ["Qwen3MoeForCausalLM"],
                "model_type": "qwen3_moe",
                "head_dim": 16,
            },
            names=("model.layers.2.mlp.gate.weight", "model.layers.0.self_attn.q_norm.weight"),
        ),
        Layout(
            "Qwen/Qwen3-Coder-30B-A3B-Instruct-FP8",
            QWEN_MOE
            | {
                "architectures": ["Qwen3MoeForCausalLM"],
                "model_type": "qwen3_moe",
                "head_dim": 16,
                "quantization_config": FP8
                | {
                    "modules_to_not_convert": [
                        "lm_head",
                        *(f"model.layers.{i}.mlp.gate" for i in range(3)),
                        *(
                            f"model.layers.2.mlp.experts.{e}.{m}_proj"
                            for e in range(8)
                            for m in ("gate", "up", "down")
                        ),
                    ]
                },
            },
            stored=fp8(16, ("lm_head", "layers.2.mlp.experts")),
            names=(
                "model.layers.0.self_attn.q_proj.weight_scale_inv",
                "model.layers.0.mlp.experts.0.up_proj.weight_scale_inv",
            ),
            files={"qwen3coder_tool_parser.py": MODEL_CODE},
        ),
        Layout(
            "mistralai/Mixtral-8x7B-Instruct-v0.1",
            ATTENTION
            | {
                "architectures": ["MixtralForCausalLM"],
                "model_type": "mixtral",
                "intermediate_size": 64,
                "num_local_experts": 8,
                "num_experts_per_tok": 2,
                "hidden_act": "silu",
                "sliding_window": None,
                "router_aux_loss_coef": 0.02,
                "rope_theta": 1000000.0,
                "rms_norm_eps": 1e-5,
            },
            names=(
                "model.layers.0.block_sparse_moe.experts.7.w1.weight",
                "model.layers.2.block_sparse_moe.gate.weight",
            ),
            files={
                "consolidated.00.pt": "x",
                "consolidated.safetensors.index.json": "{}",
                "params.json": '{"moe": {"num_experts": 8}}',
                "tokenizer.model": "x",
                "tokenizer.model.v3": "x",
                "README.md": CARD,
                ".gitattributes": "x",
            },
            travels=("tokenizer.model", "tokenizer.model.v3"),
        ),
        Layout(
            "deepseek-ai/DeepSeek-V2-Lite-Chat",
            LATENT
            | {
                "architectures": ["DeepseekV2ForCausalLM"],
                "model_type": "deepseek_v2",
                "auto_map": code("DeepseekV2Config", "DeepseekV2ForCausalLM", "deepseek"),
                "scoring_func": "softmax",
                "topk_method": "greedy",
                "norm_topk_prob": False,
                "routed_scaling_factor": 1.0,
                "rope_scaling": {
                    "beta_fast": 32,
                    "beta_slow": 1,
                    "factor": 40,
                    "mscale": 0.707,
                    "mscale_all_dim": 0.707,
                    "original_max_position_embeddings": 128,
                    "type": "yarn",
                },
            },
            names=(deepseek, "model.layers.1.mlp.shared_experts.up_proj.weight"),
            files=code_files("deepseek") | {"tokenization_deepseek_fast.py": MODEL_CODE},
        ),
        Layout(
            "deepseek-ai/DeepSeek-V3 (without its MTP layer)",
            LATENT
            | {
                "architectures": ["DeepseekV3ForCausalLM"],
                "model_type": "deepseek_v3",
                "auto_map": code("DeepseekV3Config", "DeepseekV3ForCausalLM", "deepseek"),
                "q_lora_rank": 32,
                "scoring_func": "sigmoid",
                "topk_method": "noaux_tc",
                "norm_topk_prob": True,
                "routed_scaling_factor": 2.5,
                "quantization_config": FP8,
                "n_group": 2,
                "topk_group": 1,
            },
            stored=fp8(16, ("lm_head", "embed", "mlp.gate.")),
            names=(
                deepseek + "_scale_inv",
                "model.layers.1.mlp.gate.e_score_correction_bias",
                "model.layers.0.self_attn.kv_a_proj_with_mqa.weight_scale_inv",
            ),
            files=code_files("deepseek")
            | {
                "LICENSE-CODE": LICENSE,
                "LICENSE-MODEL": LICENSE,
                "inference/model.py": MODEL_CODE,
                "inference/configs/config_16B.json": '{"n_routed_experts": 8}',
                "figures/benchmark.png": "x",
                "README_WEIGHTS.md": "x",
            },
            travels=("LICENSE-CODE", "LICENSE-MODEL", "figures/benchmark.png", "README_WEIGHTS.md"),
        ),
        _hashed(name="deepseek-ai/DeepSeek-V4-Flash (unpacked, without its MTP layer)", whole=True),
        _hashed(
            name="deepseek-ai/DeepSeek-V4-Flash (unpacked, its hash layers cut as well)",
            pruning=("--hash-layers", "cut"),
        ),
        Layout(
            "moonshotai/Moonlight-16B-A3B-Instruct",
            LATENT
            | {
                "architectures": ["DeepseekV3ForCausalLM"],
                "model_type": "deepseek_v3",
                "auto_map": code("DeepseekV3Config", "DeepseekV3ForCausalLM", "deepseek"),
                "scoring_func": "sigmoid",
                "topk_method": "noaux_tc",
                "norm_topk_prob": True,
                "routed_scaling_factor": 2.446,
                "num_nextn_predict_layers": 0,
            },
            names=(deepseek,),
            files=code_files("deepseek") | tiktoken_files(),
            travels=("tokenization_kimi.py", "word_pieces.py", "tiktoken.model"),
            flags=("--trust-remote-code",),
        ),
        Layout(
            "moonshotai/Kimi-K2-Instruct",
            LATENT
            | {
                "architectures": ["DeepseekV3ForCausalLM"],
                "model_type": "kimi_k2",
                "auto_map": code("DeepseekV3Config", "DeepseekV3ForCausalLM", "deepseek"),
                "q_lora_rank": 32,
                "scoring_func": "sigmoid",
                "topk_method": "noaux_tc",
                "norm_topk_prob": True,
                "routed_scaling_factor": 2.827,
                "quantization_config": FP8,
                "num_nextn_predict_layers": 0,
            },
            stored=fp8(16, ("lm_head", "embed", "mlp.gate.")),
            names=(deepseek + "_scale_inv",),
            files=code_files("deepseek")
            | tiktoken_files()
            | {"docs/deploy_guidance.md": "x", "THIRD_PARTY_NOTICES.md": "x"},
            travels=(
                "tokenization_kimi.py",
                "word_pieces.py",
                "tiktoken.model",
                "docs/deploy_guidance.md",
                "THIRD_PARTY_NOTICES.md",
            ),
            flags=("--trust-remote-code",),
        ),
        Layout(
            "moonshotai/Kimi-K2-Thinking",
            LATENT
            | {
                "architectures": ["DeepseekV3ForCausalLM"],
                "model_type": "kimi_k2",
                "q_lora_rank": 32,
                "norm_topk_prob": True,
                "routed_scaling_factor": 2.827,
                "quantization_config": {
                    "quant_method": "compressed-tensors",
                    "format": "pack-quantized",
                    "quantization_status": "compressed",
                    "config_groups": {"group_0": {"targets": ["Linear"], "weights": INT4}},
                    "ignore": ["lm_head", "re:.*self_attn.*", "re:.*shared_experts.*"],
                },
            },
            stored=_int4,
            names=("model.layers.1.mlp.experts.0.up_proj.weight_packed",),
            needs="compressed_tensors",
        ),
        Layout(
            "microsoft/Phi-3.5-MoE-instruct",
            ATTENTION
            | {
                "architectures": ["PhiMoEForCausalLM"],
                "model_type": "phimoe",
                "auto_map": code("PhiMoEConfig", "PhiMoEForCausalLM", "phimoe"),
                "intermediate_size": 48,
                "num_local_experts": 8,
                "num_experts_per_tok": 2,
                "attention_bias": True,
                "lm_head_bias": True,
                "hidden_act": "silu",
                "router_jitter_noise": 0.01,
                "input_jitter_noise": 0.01,
                "sliding_window": 512,
                "original_max_position_embeddings": 128,
                "router_aux_loss_coef": 0.0,
                "rope_scaling": {
                    "type": "longrope",
                    "long_factor": [1.1] * 8,
                    "short_factor": [1.0] * 8,
                    "short_mscale": 1.24,
                    "long_mscale": 1.24,
                    "original_max_position_embeddings": 128,
                },
            },
            names=("model.layers.0.block_sparse_moe.experts.7.w2.weight", "lm_head.bias"),
            files=code_files("phimoe")
            | {
                "NOTICE.md": "x",
                "SECURITY.md": "x",
                "LICENSE": LICENSE,
                "sample_finetune.py": MODEL_CODE,
            },
            travels=("NOTICE.md", "LICENSE", "SECURITY.md"),
        ),
        Layout(
            "baidu/ERNIE-4.5-21B-A3B-PT",
            ATTENTION
            | {
                "architectures": ["Ernie4_5_MoeForCausalLM"],
                "model_type": "ernie4_5_moe",
                "auto_map": code("Ernie4_5_MoeConfig", "Ernie4_5_MoeForCausalLM", "ernie4_5_moe"),
                "intermediate_size": 96,
                "moe_intermediate_size": 32,
                "moe_num_experts": 8,
                "moe_num_shared_experts": 2,
                "moe_k": 2,
                "moe_capacity": [8, 8, 8],
                "moe_layer_start_index": 1,
                "moe_layer_end_index": 2,
                "moe_layer_interval": 1,
                "moe_use_aux_free": True,
                "moe_gate": "topk",
                "use_bias": False,
                "hidden_act": "silu",
                "num_nextn_predict_layers": 0,
            },
            names=(
                "model.layers.1.mlp.experts.7.gate_proj.weight",
                "model.layers.1.mlp.moe_statics.e_score_correction_bias",
            ),
            files=code_files("ernie4_5_moe"),
        ),
        Layout(
            "tencent/Hunyuan-A13B-Instruct",
            ATTENTION
            | {
                "architectures": ["HunYuanMoEV1ForCausalLM"],
                "model_type": "hunyuan_v1_moe",
                "auto_map": code("HunYuanConfig", "HunYuanMoEV1ForCausalLM", "hunyuan"),
                "head_dim": 16,
                "intermediate_size": 48,
                "num_experts": 8,
                "moe_topk": [2, 2, 2],
                "moe_intermediate_size": [48, 48, 48],
                "num_shared_expert": [1, 1, 1],
                "use_mixed_mlp_moe": True,
                "use_qk_norm": True,
                "use_cla": False,
                "hidden_act": "silu",
                "mlp_bias": False,
                "attention_bias": False,
                "tie_word_embeddings": True,
                "rope_scaling": {
                    "type": "dynamic",
                    "alpha": 1000.0,
                    "factor": 1.0,
                    "beta_fast": 32,
                    "beta_slow": 1,
                    "mscale": 1.0,
                    "mscale_all_dim": 0.0,
                },
            },
            names=(
                "model.layers.0.mlp.experts.7.gate_proj.weight",
                "model.layers.0.mlp.gate.wg.weight",
                "model.layers.0.mlp.shared_mlp.up_proj.weight",
            ),
            files=code_files("hunyuan"),
        ),
        Layout(
            "ai21labs/Jamba-v0.1",
            ATTENTION
            | {
                "architectures": ["JambaForCausalLM"],
                "model_type": "jamba",
                "auto_map": code("JambaConfig", "JambaForCausalLM", "jamba"),
                "intermediate_size": 48,
                "num_experts": 8,
                "num_experts_per_tok": 2,
                "num_hidden_layers": 4,
                "attn_layer_period": 2,
                "attn_layer_offset": 1,
                "expert_layer_period": 2,
                "expert_layer_offset": 1,
                "hidden_act": "silu",
                "mamba_d_state": 8,
                "mamba_d_conv": 4,
                "mamba_expand": 2,
                "mamba_dt_rank": 8,
                "mamba_conv_bias": True,
                "mamba_proj_bias": False,
                "use_mamba_kernels": False,
                "num_logits_to_keep": 1,
                "router_aux_loss_coef": 0.001,
                "sliding_window": None,
            },
            names=(
                "model.layers.1.feed_forward.experts.7.gate_proj.weight",
                "model.layers.1.feed_forward.router.weight",
            ),
            files=code_files("jamba"),
        ),
        Layout(
            "nvidia/NVIDIA-Nemotron-3-Nano-30B-A3B-BF16",
            ATTENTION
            | {
                "architectures": ["NemotronHForCausalLM"],
                "model_type": "nemotron_h",
                "auto_map": {
                    "AutoConfig": "configuration_nemotron_h.NemotronHConfig",
                    "AutoModelForCausalLM": "modeling_nemotron_h.NemotronHForCausalLM",
                },
                "hybrid_override_pattern": "ME*E",
                "num_hidden_layers": 4,
                "head_dim": 16,
                "intermediate_size": 48,
                "moe_intermediate_size": 32,
                "n_routed_experts": 8,
                "n_shared_experts": 1,
                "moe_shared_expert_intermediate_size": 48,
                "num_experts_per_tok": 2,
                "n_group": 1,
                "topk_group": 1,
                "norm_topk_prob": True,
                "routed_scaling_factor": 2.5,
                "mlp_hidden_act": "relu2",
                "mamba_head_dim": 16,
                "mamba_num_heads": 4,
                "n_groups": 1,
                "ssm_state_size": 8,
                "conv_kernel": 4,
                "chunk_size": 8,
                "mamba_hidden_act": "silu",
                "use_mamba_kernels": False,
            },
            names=(
                "backbone.layers.1.mixer.experts.7.up_proj.weight",
                "backbone.layers.1.mixer.gate.e_score_correction_bias",
            ),
            files=code_files("nemotron_h")
            | {"nano_v3_reasoning_parser.py": MODEL_CODE, "bias.md": "x", "privacy.md": "x"},
            travels=("bias.md", "privacy.md"),
        ),
        Layout(
            "databricks/dbrx-instruct",
            {
                "architectures": ["DbrxForCausalLM"],
                "model_type": "dbrx",
                "auto_map": {
                    "AutoConfig": "configuration_dbrx.DbrxConfig",
                    "AutoModelForCausalLM": "modeling_dbrx.DbrxForCausalLM",
                },
                "attn_config": {"clip_qkv": 8, "kv_n_heads": 2, "rope_theta": 500000},
                "ffn_config": {
                    "ffn_hidden_size": 48,
                    "moe_loss_weight": 0.05,
                    "moe_num_experts": 8,
                    "moe_top_k": 2,
                },
                "d_model": 64,
                "n_heads": 4,
                "n_layers": 3,
                "max_seq_len": 512,
                "emb_pdrop": 0.0,
                "resid_pdrop": 0.0,
                "output_router_logits": False,
                "vocab_size": WORDS,
                "tie_word_embeddings": False,
                "torch_dtype": "bfloat16",
            },
            names=(
                "transformer.blocks.0.ffn.experts.mlp.w1",
                "transformer.blocks.0.ffn.router.layer.weight",
            ),
            files=code_files("dbrx") | {"tiktoken.py": MODEL_CODE},
            unrepaired="cannot be repaired",
        ),
        Layout(
            "openai/gpt-oss-20b (before it was packed)",
            ATTENTION
            | {
                "architectures": ["GptOssForCausalLM"],
                "model_type": "gpt_oss",
                "head_dim": 16,
                "intermediate_size": 32,
                "num_local_experts": 8,
                "num_experts_per_tok": 2,
                "experts_per_token": 2,
                "sliding_window": 16,
                "attention_bias": True,
                "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
                "hidden_act": "silu",
                "swiglu_limit": 7.0,
                "router_aux_loss_coef": 0.9,
                "rope_theta": 150000,
                "rope_scaling": {
                    "beta_fast": 32.0,
                    "beta_slow": 1.0,
                    "factor": 4.0,
                    "rope_type": "yarn",
                    "original_max_position_embeddings": 128,
                    "truncate": False,
                },
            },
            names=(
                "model.layers.0.mlp.experts.gate_up_proj_bias",
                "model.layers.0.self_attn.sinks",
            ),
            files={
                "original/model.safetensors": "x",
                "original/config.json": '{"num_experts": 8}',
                "original/dtypes.json": "{}",
                "metal/model.bin": "x",
                "USAGE_POLICY": "x",
                "chat_template.jinja": "{{ messages }}",
                "additional_chat_templates/rag.jinja": "{{ messages }}",
            },
            travels=("USAGE_POLICY", "chat_template.jinja", "additional_chat_templates/rag.jinja"),
        ),
        Layout(
            "allenai/OLMoE-1B-7B-0924",
            ATTENTION
            | {
                "architectures": ["OlmoeForCausalLM"],
                "model_type": "olmoe",
                "intermediate_size": 32,
                "num_experts": 8,
                "num_experts_per_tok": 2,
                "num_key_value_heads": 4,
                "norm_topk_prob": False,
                "hidden_act": "silu",
                "clip_qkv": None,
                "router_aux_loss_coef": 0.01,
                "rope_scaling": None,
                "attention_bias": False,
                "output_router_logits": False,
            },
            names=("model.layers.0.mlp.experts.7.up_proj.weight",),
            shards=1,
        ),
        Layout(
            "ibm-granite/granite-3.0-1b-a400m-instruct",
            ATTENTION
            | {
                "architectures": ["GraniteMoeForCausalLM"],
                "model_type": "granitemoe",
                "intermediate_size": 32,
                "num_local_experts": 8,
                "num_experts_per_tok": 2,
                "embedding_multiplier": 12.0,
                "logits_scaling": 6.0,
                "residual_multiplier": 0.22,
                "attention_multiplier": 0.0156,
                "hidden_act": "silu",
                "attention_bias": False,
                "tie_word_embeddings": True,
                "router_aux_loss_coef": 0.0,
            },
            names=(
                "model.layers.0.block_sparse_moe.input_linear.weight",
                "model.layers.0.block_sparse_moe.router.layer.weight",
            ),
            shards=1,
        ),
        Layout(
            "LiquidAI/LFM2-8B-A1B",
            ATTENTION
            | {
                "architectures": ["Lfm2MoeForCausalLM"],
                "model_type": "lfm2_moe",
                "intermediate_size": 96,
                "moe_intermediate_size": 32,
                "num_experts": 8,
                "num_experts_per_tok": 2,
                "num_dense_layers": 1,
                "conv_L_cache": 3,
                "conv_bias": False,
                "layer_types": ["conv", "full_attention", "conv"],
                "norm_eps": 1e-5,
                "norm_topk_prob": True,
                "use_expert_bias": True,
                "routed_scaling_factor": 1.0,
                "dtype": "bfloat16",
            },
            names=(
                "model.layers.1.feed_forward.experts.7.w3.weight",
                "model.layers.1.feed_forward.expert_bias",
            ),
        ),
        Layout(
            "MiniMaxAI/MiniMax-M2",
            ATTENTION
            | {
                "architectures": ["MiniMaxM2ForCausalLM"],
                "model_type": "minimax_m2",
                "auto_map": {
                    "AutoConfig": "configuration_minimax_m2.MiniMaxM2Config",
                    "AutoModelForCausalLM": "modeling_minimax_m2.MiniMaxM2ForCausalLM",
                },
                "head_dim": 16,
                "rotary_dim": 8,
                "intermediate_size": 32,
                "num_local_experts": 8,
                "num_experts_per_tok": 2,
                "scoring_func": "sigmoid",
                "use_routing_bias": True,
                "use_qk_norm": True,
                "qk_norm_type": "per_layer",
                "hidden_act": "silu",
                "num_mtp_modules": 0,
                "mtp_transformer_layers": 0,
                "use_mtp": False,
                "shared_intermediate_size": 0,
                "attn_type_list": [1, 1, 1],
            },
            names=(
                "model.layers.0.block_sparse_moe.experts.7.w1.weight",
                "model.layers.0.block_sparse_moe.e_score_correction_bias",
            ),
            files=code_files("minimax_m2"),
        ),
        Layout(
            "zai-org/GLM-4.5-Air (without its MTP layer)",
            ATTENTION
            | {
                "architectures": ["Glm4MoeForCausalLM"],
                "model_type": "glm4_moe",
                "head_dim": 16,
                "intermediate_size": 96,
                "moe_intermediate_size": 32,
                "n_routed_experts": 8,
                "n_shared_experts": 1,
                "num_experts_per_tok": 2,
                "n_group": 1,
                "topk_group": 1,
                "first_k_dense_replace": 1,
                "norm_topk_prob": True,
                "routed_scaling_factor": 1.0,
                "partial_rotary_factor": 0.5,
                "use_qk_norm": False,
                "attention_bias": True,
                "hidden_act": "silu",
                "num_nextn_predict_layers": 0,
            },
            names=("model.layers.1.mlp.experts.7.gate_proj.weight",),
        ),
        Layout(
            "rednote-hilab/dots.llm1.inst",
            ATTENTION
            | {
                "architectures": ["Dots1ForCausalLM"],
                "model_type": "dots1",
                "head_dim": 16,
                "auto_map": code("Dots1Config", "Dots1ForCausalLM", "dots1"),
                "intermediate_size": 96,
                "moe_intermediate_size": 32,
                "n_routed_experts": 8,
                "n_shared_experts": 2,
                "num_experts_per_tok": 2,
                "n_group": 1,
                "topk_group": 1,
                "first_k_dense_replace": 1,
                "norm_topk_prob": True,
                "routed_scaling_factor": 2.5,
                "scoring_func": "noaux_tc",
                "hidden_act": "silu",
                "attention_bias": False,
                "sliding_window": None,
            },
            names=("model.layers.1.mlp.experts.7.gate_proj.weight",),
            files=code_files("dots1"),
        ),
        Layout(
            "Qwen/Qwen3-VL-30B-A3B-Instruct",
            {
                "architectures": ["Qwen3VLMoeForConditionalGeneration"],
                "model_type": "qwen3_vl_moe",
                "image_token_id": 151,
                "video_token_id": 152,
                "vision_start_token_id": 153,
                "vision_end_token_id": 154,
                "tie_word_embeddings": False,
                "text_config": QWEN_MOE
                | {
                    "model_type": "qwen3_vl_moe_text",
                    "moe_intermediate_size": 40,  # no square, which says nothing of its layout
                    "head_dim": 16,
                    "dtype": "bfloat16",
                    "rope_scaling": {
                        "mrope_interleaved": True,
                        "mrope_section": [4, 2, 2],
                        "rope_type": "default",
                    },
                },
                "vision_config": {
                    "model_type": "qwen3_vl_moe",
                    "depth": 1,
                    "hidden_size": 32,
                    "intermediate_size": 48,
                    "num_heads": 2,
                    "out_hidden_size": 64,
                    "patch_size": 16,
                    "spatial_merge_size": 2,
                    "temporal_patch_size": 2,
                    "in_channels": 3,
                    "num_position_embeddings": 16,
                    "hidden_act": "gelu",
                    "deepstack_visual_indexes": [0],
                },
            },
            stored=_transposed_experts,
            names=(
                "model.language_model.layers.0.mlp.experts.gate_up_proj",
                "model.visual.blocks.0.attn.qkv.weight",
            ),
            files={
                "preprocessor_config.json": '{"image_processor_type": "Qwen2VLImageProcessorFast"}',
                "video_preprocessor_config.json": "{}",
                "chat_template.json": "{}",
            },
            travels=(
                "video_preprocessor_config.json",
                "preprocessor_config.json",
                "chat_template.json",
            ),
        ),
        Layout(
            "nvidia/Qwen3-30B-A3B-FP4",
            QWEN_MOE
            | {
                "architectures": ["Qwen3MoeForCausalLM"],
                "model_type": "qwen3_moe",
                "head_dim": 16,
            },
            stored=_nvfp4,
            files={
                "hf_quant_config.json": '{"producer": {"name": "modelopt"}, "quantization": '
                '{"quant_algo": "NVFP4", "kv_cache_quant_algo": "FP8", "group_size": 16}}'
            },
            travels=("hf_quant_config.json",),
        ),
        Layout(
            "nvidia/Qwen3-30B-A3B-FP4, its own config telling it",
            QWEN_MOE
            | {
                "architectures": ["Qwen3MoeForCausalLM"],
                "model_type": "qwen3_moe",
                "head_dim": 16,
                "quantization_config": {
                    "quant_algo": "NVFP4",
                    "quant_method": "modelopt",
                    "producer": {"name": "modelopt", "version": "0.35"},
                    "ignore": ["lm_head"],
                },
            },
            stored=_nvfp4,
        ),
        Layout(
            "a checkpoint packed in FP8 by a tool that says so nowhere",
            QWEN_MOE
            | {
                "architectures": ["Qwen3MoeForCausalLM"],
                "model_type": "qwen3_moe",
                "head_dim": 16,
            },
            stored=fp8(16, ("lm_head",)),
            refused="config.json does not say how",
        ),
        Layout(
            "an FP8 checkpoint with single experts left as they were",
            QWEN_MOE
            | {
                "architectures": ["Qwen3MoeForCausalLM"],
                "model_type": "qwen3_moe",
                "head_dim": 16,
                "quantization_config": FP8
                | {"modules_to_not_convert": ["lm_head", "model.layers.1.mlp.experts.3.down_proj"]},
            },
            stored=fp8(16, ("lm_head", "layers.1.mlp.experts.3.down")),
            refused="of which some are packed, or packed otherwise",
        ),
        Layout(
            "RedHatAI/Qwen3-30B-A3B-FP8-dynamic",
            QWEN_MOE
            | {
                "architectures": ["Qwen3MoeForCausalLM"],
                "model_type": "qwen3_moe",
                "head_dim": 16,
                "compression_config": {
                    "quant_method": "compressed-tensors",
                    "format": "float-quantized",
                    "quantization_status": "compressed",
                    "config_groups": {"group_0": {"targets": ["Linear"], "weights": FP8_ROWS}},
                    "ignore": ["lm_head", "re:.*mlp.gate$"],
                },
            },
            stored=_fp8_rows,
            needs="compressed_tensors",
        ),
    ]
    return found


def _transposed_experts(tensors: Tensors, config: dict[str, Any]) -> Tensors:
    """Experts as [E, D, 2F] and [E, F, D], where the model has [E, 2F, D] and [E, D, F]."""
    wide = config["text_config"]["hidden_size"]
    return {
        n: t.transpose(1, 2).contiguous()
        if ".experts." in n and t.dim() == 3 and (t.shape[2] == wide) == ("gate_up" in n)
        else t
        for n, t in tensors.items()
    }


def _hash_tables(tensors: Tensors, config: dict[str, Any]) -> Tensors:
    """Names as published; distinct experts of every token, at random, as 32-bit numbers."""
    g = torch.Generator().manual_seed(2)
    found: Tensors = {}
    for name, t in tensors.items():
        name = name.removeprefix("model.")
        name = name.replace("embed_tokens.", "embed.").replace("hc_head.hc_", "hc_head_")
        if name.endswith("tid2eid"):
            order = torch.rand(len(t), config["n_routed_experts"], generator=g).argsort(1)
            t = order[:, : t.shape[1]].to(torch.int32)
        found[name] = t.contiguous()
    return found


def _int4(tensors: Tensors, config: dict[str, Any]) -> Tensors:
    """Routed experts in INT4: eight to a word from the lowest bits on, a scale for every 16."""
    found: Tensors = {}
    for name, t in tensors.items():
        if ".experts." not in name:
            found[name] = t
            continue
        groups = t.float().unflatten(-1, (-1, 16))
        scale = (groups.abs().amax(-1) / 7.5).bfloat16()
        codes = (groups / scale.float().unsqueeze(-1)).round().clamp(-8, 7).flatten(-2) + 8
        words = (codes.long().unflatten(-1, (-1, 8)) << (torch.arange(8) * 4)).sum(-1)
        home = name.removesuffix("weight")
        found[f"{home}weight_packed"] = torch.where(words >= 2**31, words - 2**32, words).int()
        found[f"{home}weight_scale"] = scale
        found[f"{home}weight_shape"] = torch.tensor(t.shape, dtype=torch.int32)
    return found


def _fp8_rows(tensors: Tensors, config: dict[str, Any]) -> Tensors:
    """Every linear matrix but routers and the head in FP8, with a scale for each row."""
    found: Tensors = {}
    for name, t in tensors.items():
        found[name] = t
        if name.endswith("_proj.weight"):
            scale = (t.float().abs().amax(1, keepdim=True) / 448).bfloat16()
            found[name] = (t.float() / scale.float()).to(torch.float8_e4m3fn)
            found[f"{name}_scale"] = scale
    return found


def _nvfp4(tensors: Tensors, config: dict[str, Any]) -> Tensors:
    """Two values a byte, with scales of 16 and one for all."""
    found: Tensors = {}
    for name, t in tensors.items():
        if ".experts." not in name:
            found[name] = t
            continue
        home = name.removesuffix("weight")
        codes = (t[:, ::2].float() * 1e4).long() % 256
        found[name] = codes.to(torch.uint8)
        found[f"{home}weight_scale"] = torch.ones(t.shape[0], t.shape[1] // 16).to(
            torch.float8_e4m3fn
        )
        found[f"{home}weight_scale_2"] = torch.full((), 0.01)
        found[f"{home}input_scale"] = torch.ones(())
    return found


LAYOUTS = _layouts()
