"""Checkpoints with heads for multi-token prediction, laid out as they are published, tiny.

The body is saved by stock transformers, which writes the Hub's own names. The head's layer is the
last layer of a second random model, under the head's names; what is around it is drawn at random.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from places import MODEL
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import CONFIG_MAPPING

from moe_fair.engines.auto import auto_class

INDEX = "model.safetensors.index.json"
WIDTH, VOCABULARY = 32, 4096  # the reference model's tokenizer
SMALL: dict[str, Any] = {
    "vocab_size": VOCABULARY, "hidden_size": WIDTH, "intermediate_size": 32,
    "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8,
    "max_position_embeddings": 256, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": None,
    "moe_intermediate_size": 16, "num_experts_per_tok": 2, "tie_word_embeddings": False,
}  # fmt: skip
LAYER = {  # stored name of a head's part -> its place, where the head is one more layer
    "projection": "eh_proj.weight", "embedding": "enorm.weight", "hidden": "hnorm.weight",
    "output": "shared_head.norm.weight",
}  # fmt: skip
QWEN = {
    "projection": "mtp.fc.weight", "embedding": "mtp.pre_fc_norm_embedding.weight",
    "hidden": "mtp.pre_fc_norm_hidden.weight", "output": "mtp.norm.weight",
}  # fmt: skip


@dataclass(frozen=True)
class Replica:
    """How a family publishes.

    Attributes:
        kind: transformers' model type.
        config: beside SMALL.
        last: prefix of the stored names of the layer that the head's is like.
        head: prefix of the head's layer.
        before: the same two of a layer of the head before that one.
        around: role -> stored name.
        copies: names under which the head repeats embeddings and output matrix.
        promise: what the config's number of heads is called.
    """

    kind: str
    config: Mapping[str, Any]
    last: str
    head: str
    around: Mapping[str, str]
    copies: Mapping[str, str]
    promise: str = "num_nextn_predict_layers"
    before: tuple[str, str] | None = None

    @property
    def block(self) -> str:
        """Where the head's experts lie."""
        return self.head + ("mixer" if self.kind == "nemotron_h" else "mlp")


def one_more_layer(kind: str, depth: int, config: Mapping[str, Any]) -> Replica:
    """As GLM and DeepSeek publish it: the head is the layer after the last, of `depth`."""
    head = f"model.layers.{depth}."
    return Replica(
        kind,
        {"num_hidden_layers": depth, "first_k_dense_replace": depth - 3, **config},
        f"model.layers.{depth - 1}.",
        head,
        {role: head + name for role, name in LAYER.items()},
        {
            head + "embed_tokens.weight": "model.embed_tokens.weight",
            head + "shared_head.head.weight": "lm_head.weight",
        },
    )


# stock transformers knows a head by the number of the published model's layers: 46 and 61
GLM = one_more_layer(
    "glm4_moe", 46, {"n_routed_experts": 8, "n_shared_experts": 1, "num_nextn_predict_layers": 1}
)
DEEPSEEK = one_more_layer(
    "deepseek_v3", 61,
    {"n_routed_experts": 8, "n_shared_experts": 1, "n_group": 2, "topk_group": 1,
     "q_lora_rank": 16, "kv_lora_rank": 8, "qk_nope_head_dim": 8, "qk_rope_head_dim": 4,
     "v_head_dim": 8, "num_key_value_heads": 4, "head_dim": 4, "num_nextn_predict_layers": 1},
)  # fmt: skip
LINEAR = {
    "num_experts": 8, "shared_expert_intermediate_size": 16, "num_hidden_layers": 4,
    "layer_types": ["linear_attention", "full_attention"] * 2, "linear_num_value_heads": 4,
    "linear_num_key_heads": 2, "linear_key_head_dim": 8, "linear_value_head_dim": 8,
}  # fmt: skip
QWEN3_NEXT = Replica(
    "qwen3_next", {**LINEAR, "decoder_sparse_step": 1, "mlp_only_layers": []},
    "model.layers.3.", "mtp.layers.0.", QWEN, {},
)  # fmt: skip
QWEN3_5 = Replica(
    "qwen3_5_moe_text", LINEAR, "model.layers.3.", "mtp.layers.0.", QWEN, {},
    promise="mtp_num_hidden_layers",
)  # fmt: skip
NEMOTRON = Replica(
    "nemotron_h",
    {"layers_block_type": ["moe", "linear_attention", "full_attention", "moe"],
     "n_routed_experts": 8, "n_shared_experts": 1, "moe_shared_expert_intermediate_size": 16,
     "mamba_num_heads": 4, "mamba_head_dim": 16, "n_groups": 1, "ssm_state_size": 8,
     "mamba_n_groups": 1, "chunk_size": 8},
    "backbone.layers.3.", "mtp.layers.1.",
    {"projection": "mtp.layers.0.eh_proj.weight", "embedding": "mtp.layers.0.enorm.weight",
     "hidden": "mtp.layers.0.hnorm.weight", "output": "mtp.layers.1.final_layernorm.weight"},
    {}, before=("backbone.layers.2.", "mtp.layers.0."),
)  # fmt: skip
REPLICAS = {r.kind: r for r in (GLM, DEEPSEEK, QWEN3_NEXT, QWEN3_5, NEMOTRON)}


def random_model(replica: Replica, seed: int) -> Any:
    """A model of the family whose norms and biases are not all the same."""
    config = CONFIG_MAPPING[replica.kind](**{**SMALL, **replica.config})
    torch.manual_seed(seed)
    model = auto_class(config).from_config(config, dtype=torch.float32)
    generator = torch.Generator().manual_seed(seed + 1)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(torch.randn(p.shape, generator=generator) * (0.08 if p.dim() >= 2 else 0.02))
    return model.eval()


def write_replica(
    replica: Replica, folder: Path, *, apart: str | None = None, head: bool = True
) -> Path:
    """The checkpoint in `folder`, in two shards with an index.

    Args:
        apart: file for the head's tensors, which the index then does not name.
        head: write its tensors; else the config alone promises them.
    """
    random_model(replica, 0).save_pretrained(folder)
    body = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    save_other = folder / "other"
    random_model(replica, 5).save_pretrained(save_other)
    other = load_file(save_other / "model.safetensors")
    shutil.rmtree(save_other)
    own = _head(replica, body, other) if head else {}
    names = sorted(body)
    shards = {"model-00001-of-00002.safetensors": {n: body[n] for n in names[::2]},
              "model-00002-of-00002.safetensors": {n: body[n] for n in names[1::2]}}  # fmt: skip
    if apart is None:
        shards["model-00002-of-00002.safetensors"] |= own
    elif own:
        save_file(own, folder / apart, {"format": "pt"})
    for file, tensors in shards.items():
        save_file(tensors, folder / file, {"format": "pt"})
    weight_map = {n: file for file, tensors in shards.items() for n in tensors}
    (folder / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    config = json.loads((folder / "config.json").read_text())
    config[replica.promise] = 1
    (folder / "config.json").write_text(json.dumps(config))
    for file in MODEL.glob("tokenizer*"):
        shutil.copy(file, folder)
    return folder


def _head(
    replica: Replica, body: Mapping[str, Tensor], other: Mapping[str, Tensor]
) -> dict[str, Tensor]:
    g = torch.Generator().manual_seed(9)
    layers = [(replica.last, replica.head), *([replica.before] if replica.before else [])]
    own = {
        head + n.removeprefix(last): t.clone()
        for last, head in layers
        for n, t in other.items()
        if n.startswith(last)
    }
    assert own, replica.kind
    for role, name in replica.around.items():
        width = replica.config.get("hidden_size", WIDTH)
        shape = (width, 2 * width) if role == "projection" else (width,)
        scale = 0.15 if role == "projection" else 0.1
        middle = 0.0 if role == "projection" or replica.head.startswith("mtp") else 1.0
        own[name] = middle + torch.randn(shape, generator=g) * scale
    return own | {name: body[of].clone() for name, of in replica.copies.items()}
