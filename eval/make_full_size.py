"""Write a Qwen1.5-MoE-A2.7B-shaped checkpoint with random weights, without holding it in memory.

    python eval/make_full_size.py -o full             # 14.3 B parameters, 28.6 GB in bfloat16
    python eval/make_full_size.py -o small --scale 8  # every width divided by 8
    python eval/make_full_size.py -o deep --scale 8 --layers 48

One matrix per expert and shards of at most 4 GB, as on the Hub. The tokenizer is the reference
model's, whose ids all lie within the vocabulary. Weights are normal with deviation 0.02; norms are
one. The same arguments give the same bytes, on however many processes (one a core): a tensor's
numbers come from its own name.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import struct
import zlib
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import torch

TOKENIZER = Path(__file__).with_name("tiny-qwen2-moe")
SHARD_BYTES = 4_000_000_000
Shape = tuple[int, ...]


def shape_config(scale: int, layers: int) -> dict:
    """The published configuration of Qwen1.5-MoE-A2.7B with widths divided by `scale`."""
    return {
        "architectures": ["Qwen2MoeForCausalLM"],
        "model_type": "qwen2_moe",
        "hidden_size": 2048 // scale,
        "intermediate_size": 5632 // scale,
        "moe_intermediate_size": 1408 // scale,
        "shared_expert_intermediate_size": 5632 // scale,
        "num_hidden_layers": layers,
        "num_attention_heads": 16,
        "num_key_value_heads": 16,
        "num_experts": 60,
        "num_experts_per_tok": 4,
        "norm_topk_prob": False,
        "decoder_sparse_step": 1,
        "mlp_only_layers": [],
        "hidden_act": "silu",
        "max_position_embeddings": 8192,
        "rms_norm_eps": 1e-6,
        "rope_theta": 1000000.0,
        "tie_word_embeddings": False,
        "vocab_size": 151936 // scale,
        "bos_token_id": 0,
        "eos_token_id": 0,
        "pad_token_id": 0,
        "dtype": "bfloat16",
    }


def tensors(c: dict) -> Iterator[tuple[str, Shape]]:
    """Names and shapes as on the Hub, layer by layer."""
    d, f, s = (
        c[k] for k in ("hidden_size", "moe_intermediate_size", "shared_expert_intermediate_size")
    )
    yield "model.embed_tokens.weight", (c["vocab_size"], d)
    for i in range(c["num_hidden_layers"]):
        at = f"model.layers.{i}."
        yield at + "input_layernorm.weight", (d,)
        for e in range(c["num_experts"]):
            expert = f"{at}mlp.experts.{e}."
            yield expert + "down_proj.weight", (d, f)
            yield expert + "gate_proj.weight", (f, d)
            yield expert + "up_proj.weight", (f, d)
        yield at + "mlp.gate.weight", (c["num_experts"], d)
        yield at + "mlp.shared_expert.down_proj.weight", (d, s)
        yield at + "mlp.shared_expert.gate_proj.weight", (s, d)
        yield at + "mlp.shared_expert.up_proj.weight", (s, d)
        yield at + "mlp.shared_expert_gate.weight", (1, d)
        yield at + "post_attention_layernorm.weight", (d,)
        for name in ("k", "q", "v"):
            yield f"{at}self_attn.{name}_proj.bias", (d,)
            yield f"{at}self_attn.{name}_proj.weight", (d, d)
        yield at + "self_attn.o_proj.weight", (d, d)
    yield "model.norm.weight", (d,)
    yield "lm_head.weight", (c["vocab_size"], d)


def divide(items: Iterator[tuple[str, Shape]]) -> Iterator[list[tuple[str, Shape]]]:
    """Shards of at most SHARD_BYTES."""
    shard: list[tuple[str, Shape]] = []
    size = 0
    for name, shape in items:
        length = 2 * torch.Size(shape).numel()
        if shard and size + length > SHARD_BYTES:
            yield shard
            shard, size = [], 0
        shard.append((name, shape))
        size += length
    yield shard


def lay_out(path: Path, shard: list[tuple[str, Shape]]) -> list[tuple[str, Shape, int]]:
    """Write a safetensors file's header; returns its tensors with their places in the file."""
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for name, shape in shard:
        end = offset + 2 * torch.Size(shape).numel()
        header[name] = {"dtype": "BF16", "shape": list(shape), "data_offsets": [offset, end]}
        offset = end
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as f:
        f.write(struct.pack("<Q", len(text)) + text)
        f.truncate(8 + len(text) + offset)
    return [
        (name, shape, 8 + len(text) + header[name]["data_offsets"][0])  # type: ignore[index]
        for name, shape in shard
    ]


def fill(path: Path, placed: list[tuple[str, Shape, int]], seed: int) -> None:
    """Write some tensors' values where they belong, one in memory at a time."""
    torch.set_num_threads(1)
    with path.open("r+b") as f:
        for name, shape, at in placed:
            f.seek(at)
            f.write(weights(name, shape, seed).view(torch.int16).numpy().tobytes())


def weights(name: str, shape: Shape, seed: int) -> torch.Tensor:
    """One tensor in bfloat16."""
    if name.endswith("norm.weight"):
        return torch.ones(shape, dtype=torch.bfloat16)
    generator = torch.Generator().manual_seed(zlib.crc32(f"{seed} {name}".encode()))
    return (torch.randn(shape, generator=generator) * 0.02).to(torch.bfloat16)


def main() -> None:
    """Write the checkpoint under a temporary name, then give it its own."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("-o", "--output", type=Path, required=True)
    parser.add_argument("--scale", type=int, default=1, help="divide every width by this")
    parser.add_argument("--layers", type=int, default=24)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    if args.output.exists():
        parser.error(f"{args.output} exists")
    config = shape_config(args.scale, args.layers)
    shards = list(divide(tensors(config)))
    need = sum(2 * torch.Size(s).numel() for shard in shards for _, s in shard)
    free = shutil.disk_usage(args.output.absolute().parent).free
    if need > free:
        parser.error(f"{need / 1e9:.1f} GB are needed and {free / 1e9:.1f} GB are free")
    print(f"writing {need / 2e9:.2f} B parameters, {need / 1e9:.1f} GB, in {len(shards)} shards")
    folder = args.output.with_name(args.output.name + ".partial")
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    weight_map = {}
    with ProcessPoolExecutor(os.cpu_count()) as pool:
        pieces = []
        for i, shard in enumerate(shards):
            name = f"model-{i + 1:05d}-of-{len(shards):05d}.safetensors"
            placed = lay_out(folder / name, shard)
            weight_map |= {n: name for n, _ in shard}
            pieces += [
                pool.submit(fill, folder / name, placed[j : j + 64], args.seed)
                for j in range(0, len(placed), 64)
            ]
        for piece in pieces:
            piece.result()
    index = {"metadata": {"total_size": need}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=1))
    (folder / "config.json").write_text(json.dumps(config, indent=2))
    for file in TOKENIZER.glob("*token*"):
        shutil.copyfile(file, folder / file.name)
    folder.rename(args.output)


if __name__ == "__main__":
    main()
