"""What calibrating very large models costs: bytes read, FLOPs, bytes reduced, memory.

    python eval/scaling.py            # the tables of eval/SCALING.md
    python eval/scaling.py --check    # every term against a measurement, on models that fit here

A `Shape` holds the published numbers of a model's config.json. The terms are written out below, one
function each; SCALING.md says them as formulas. Times follow from the terms and the machine's
rates, which are assumptions and stand in `MACHINES`.
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

FLOAT64 = 8
# of every expert and domain: sums that need no gradient, Taylor sums, and four of its removal (one
# by every other sequence); one more for every other expert is the removal of both
SCALARS = 8 + 3 + 4
VECTORS = 2  # Σf and Σf², a value for every model dimension
LOGITS = 2**24  # elements of a chunk of logits, as the streaming engine has it


@dataclass(frozen=True)
class Shape:
    """A decoder-only mixture-of-experts model, by its config's numbers."""

    name: str
    layers: int
    dense: int  # layers at the start whose MLP has no experts
    model: int  # D
    expert: int  # F of a routed or shared expert
    mlp: int  # F of a dense layer's MLP
    experts: int  # E
    top_k: int
    shared: int  # always active experts
    heads: int
    kv_heads: int
    head: int  # of a query or key
    value_head: int
    vocabulary: int
    q_rank: int = 0  # latent attention: ranks of queries and of keys and values, and rotary part
    kv_rank: int = 0
    rope: int = 0
    stored: int = 2  # bytes of a weight on disk
    router_bias: bool = False
    packed: float = 2.0  # bytes of a packed weight, scales included, as published packed
    packed_experts: bool = False  # routed experts alone are

    def attention(self) -> int:
        """Weights of one layer's attention, norms of heads and ranks left out."""
        d, h = self.model, self.heads
        if not self.kv_rank:
            return d * self.head * (h + self.kv_heads) + d * self.value_head * (h + self.kv_heads)
        down = d * self.q_rank + d * (self.kv_rank + self.rope)
        nope = self.head - self.rope
        up = self.q_rank * h * self.head + self.kv_rank * h * (nope + self.value_head)
        return down + up + h * self.value_head * d

    def moe_layer(self) -> int:
        """Weights of one layer with experts."""
        swiglu = 3 * self.model * self.expert
        return self.attention() + (self.experts + self.shared) * swiglu + self.model * self.experts

    def dense_layer(self) -> int:
        """Weights of one layer without."""
        return self.attention() + 3 * self.model * self.mlp

    def outside(self) -> int:
        """Embedding and head."""
        return 2 * self.vocabulary * self.model

    def parameters(self) -> int:
        """All weights; norms and biases are less than a thousandth and left out."""
        sparse = (self.layers - self.dense) * self.moe_layer()
        return sparse + self.dense * self.dense_layer() + self.outside()

    def packed_weights(self) -> int:
        """Of the weights those that are packed; routers, embedding and head never are."""
        sparse = self.layers - self.dense
        if self.packed_experts:
            return sparse * self.experts * 3 * self.model * self.expert
        routers = sparse * self.model * self.experts
        return self.parameters() - routers - self.outside()

    def linear(self) -> float:
        """Weights that one token meets in the decoder layers."""
        active = 3 * self.model * self.expert * (self.top_k + self.shared)
        router = self.model * self.experts
        sparse = (self.layers - self.dense) * (self.attention() + active + router)
        return sparse + self.dense * self.dense_layer()


SHAPES = (
    Shape("Qwen3-235B-A22B", 94, 0, 4096, 1536, 12288, 128, 8, 0, 64, 4, 128, 128, 151936,
          packed=1 + 2 / 128**2),
    Shape("DeepSeek-V3 671B", 61, 3, 7168, 2048, 18432, 256, 8, 1, 128, 128, 192, 128, 129280,
          1536, 512, 64, router_bias=True, packed=1 + 4 / 128**2),
    Shape("Kimi-K2 1T", 61, 1, 7168, 2048, 18432, 384, 8, 1, 64, 64, 192, 128, 163840,
          1536, 512, 64, router_bias=True, packed=1 / 2 + 2 / 32, packed_experts=True),
)  # fmt: skip


@dataclass(frozen=True)
class Machine:
    """Rates that are assumed, in bytes and FLOPs per second."""

    name: str
    processes: int
    flops: float  # of one device, as reached in practice
    disk: float
    bus: float  # main memory to one device
    reduce: float  # between two processes


MACHINES = (
    Machine("1 × H100 + NVMe", 1, 0.35 * 989e12, 6e9, 40e9, 1e9),
    Machine("8 × H100 + NVMe", 8, 0.35 * 989e12, 12e9, 25e9, 1e9),
)


# ---- the terms, for one chunk of S sequences of L tokens over P processes -------------------


def bytes_read(s: Shape, backward: bool = True) -> int:
    """Once per machine: every layer forward and backward, embedding and head for each end."""
    return s.stored * (2 if backward else 1) * s.parameters()


def packed_bytes_read(s: Shape) -> float:
    """The same of the checkpoint that is published packed: FP8 in squares, or INT4 in groups."""
    packed = s.packed_weights()
    return 2 * (s.packed * packed + s.stored * (s.parameters() - packed))


def forward_flops(s: Shape, tokens: int, length: int) -> float:
    """One pass through the layers: two per weight and token, and attention over `length` keys."""
    attention = 2 * length * s.heads * (s.head + s.value_head) * s.layers
    return tokens * (2 * s.linear() + attention)


def head_flops(s: Shape, tokens: int) -> float:
    """The head, forward."""
    return 2.0 * tokens * s.model * s.vocabulary


def flops(s: Shape, tokens: int, length: int, extra: float = 1.0) -> float:
    """Streaming with every statistic: forward, forward again, gradient of activations alone.

    Args:
        extra: candidates of a token beside the routed (docs/methods.md, section 6); 1 where
            groups do not limit.
    """
    once = forward_flops(s, tokens, length)
    attention = once - tokens * 2 * s.linear()
    counterfactual = 2 * tokens * (s.layers - s.dense) * 3 * s.model * s.expert * extra
    return 2 * once + (once + attention) + 2 * head_flops(s, tokens) + counterfactual


def statistics_bytes(s: Shape, domains: int, sequences: int, pairs: bool = True) -> int:
    """Sums (with what rounding took: twice), Taylor rows; of all layers."""
    values = SCALARS + s.experts + VECTORS * s.model
    sums = domains * s.experts * values * (2 if pairs else 1)
    constants = 3 * s.experts
    rows = sequences * s.experts
    return (s.layers - s.dense) * FLOAT64 * (sums + constants + rows)


def activation_bytes(s: Shape, tokens: int, item: int) -> int:
    """Every layer's input, kept for the backward: 256 MB in memory, the rest in files."""
    return s.layers * tokens * s.model * item


def packed_layer(s: Shape, item: int) -> float:
    """Bytes of one layer whose routed experts stay packed, and of one of their matrices unpacked,
    by way of float32."""
    matrix = s.model * s.expert
    experts = s.experts * 3 * matrix
    return experts * s.packed + (s.moe_layer() - experts) * item + matrix * (2 * item + 4)


def device_bytes(s: Shape, batch_tokens: int, item: int, layer: float | None = None) -> float:
    """Weights of the largest group, or logits and gradient; and a batch's rows at one layer.

    Args:
        layer: bytes of one, where it is not unpacked.
    """
    layer = s.moe_layer() * item if layer is None else layer
    weights = max(layer, s.outside() * item + 3 * 4 * LOGITS)
    rows = batch_tokens * (s.top_k + 1) * (2 * s.model + 3 * s.expert) * item
    return weights + rows


def seconds(s: Shape, m: Machine, tokens: int, length: int, domains: int, item: int = 2) -> dict:
    """Per phase; the disk and the computing overlap, the copy to the device does not."""
    read = bytes_read(s) / m.disk  # as much for eight devices as for one
    compute = flops(s, tokens, length) / (m.processes * m.flops)
    copy = bytes_read(s) / s.stored * item / m.bus
    rounds = (m.processes - 1).bit_length()
    moved = statistics_bytes(s, domains, tokens // length // m.processes) * rounds / m.reduce
    return {"disk": read, "compute": compute, "copy": copy, "reduce": moved,
            "all": max(read, compute) + copy + moved}  # fmt: skip


def tables(sequences: int = 128, length: int = 2048, domains: int = 4) -> Iterator[str]:
    """Markdown."""
    tokens = sequences * length
    yield f"{sequences} sequences of {length} tokens, {domains} domains, one chunk, bfloat16.\n"
    yield "| | " + " | ".join(s.name for s in SHAPES) + " |"
    yield "|---" * (len(SHAPES) + 1) + "|"
    rows = {
        "parameters": lambda s: f"{s.parameters() / 1e9:.1f} B",
        "one MoE layer": lambda s: f"{s.moe_layer() * 2 / 1e9:.1f} GB",
        "bytes read, per machine": lambda s: f"{bytes_read(s) / 1e12:.2f} TB",
        "the same, packed as published (FP8, FP8, INT4)": lambda s: (
            f"{packed_bytes_read(s) / 1e12:.2f} TB"
        ),
        "FLOPs": lambda s: f"{flops(s, tokens, length) / 1e15:,.0f} P",
        "statistics, in memory": lambda s: (
            f"{statistics_bytes(s, domains, sequences) / 1e9:.1f} GB"
        ),
        "statistics, saved": lambda s: (
            f"{statistics_bytes(s, domains, sequences, pairs=False) / 1e9:.1f} GB"
        ),
        "reduced per round and process": lambda s: (
            f"{statistics_bytes(s, domains, sequences // 8) / 1e9:.1f} GB"
        ),
        "boundary activations": lambda s: f"{activation_bytes(s, tokens, 2) / 1e9:.0f} GB",
        "on the device, 8 × 2048 tokens a batch": lambda s: (
            f"{device_bytes(s, 8 * 2048, 2) / 1e9:.0f} GB + statistics"
        ),
        "one MoE layer whose experts stay packed": lambda s: f"{packed_layer(s, 2) / 1e9:.1f} GB",
        "on the device, experts packed": lambda s: (
            f"{device_bytes(s, 8 * 2048, 2, packed_layer(s, 2)) / 1e9:.0f} GB + statistics"
        ),
        "shared by a machine's processes, two layers as stored": lambda s: (
            f"{2 * s.moe_layer() * s.stored / 1e9:.0f} GB"
        ),
    }
    for what, cell in rows.items():
        yield f"| {what} | " + " | ".join(cell(s) for s in SHAPES) + " |"
    for m in MACHINES:
        yield f"\n{m.name}:\n"
        yield "| seconds | " + " | ".join(s.name for s in SHAPES) + " |"
        yield "|---" * (len(SHAPES) + 1) + "|"
        times = [seconds(s, m, tokens, length, domains) for s in SHAPES]
        for phase in times[0]:
            yield f"| {phase} | " + " | ".join(f"{t[phase]:,.0f}" for t in times) + " |"


# ---- every term against a measurement --------------------------------------------------------


def small(kind: str) -> tuple[Shape, Any]:
    """A model of this type that fits here, and its shape."""
    from transformers import CONFIG_MAPPING

    common = {
        "vocab_size": 4096, "hidden_size": 128, "num_hidden_layers": 4, "intermediate_size": 192,
        "moe_intermediate_size": 64, "num_attention_heads": 4, "num_experts_per_tok": 4,
        "pad_token_id": 0, "bos_token_id": 0, "eos_token_id": 0, "max_position_embeddings": 512,
        "tie_word_embeddings": False,
    }  # fmt: skip
    if kind == "qwen3_moe":
        config = CONFIG_MAPPING[kind](
            **common, num_experts=24, num_key_value_heads=2, head_dim=32, mlp_only_layers=[]
        )
        shape = Shape(kind, 4, 0, 128, 64, 192, 24, 4, 0, 4, 2, 32, 32, 4096)
    else:
        config = CONFIG_MAPPING[kind](
            **common, n_routed_experts=24, n_shared_experts=1, first_k_dense_replace=1,
            num_key_value_heads=4, q_lora_rank=48, kv_lora_rank=32, qk_nope_head_dim=32,
            qk_rope_head_dim=16, v_head_dim=32, n_group=1, topk_group=1,
        )  # fmt: skip
        shape = Shape(kind, 4, 1, 128, 64, 192, 24, 4, 1, 4, 4, 48, 32, 4096, 48, 32, 16,
                      router_bias=True)  # fmt: skip
    return shape, config


def measured(kind: str) -> Iterator[tuple[str, float, float]]:
    """(term, by the formula, as measured) of one small model."""
    import torch
    from torch.utils.flop_counter import FlopCounterMode
    from transformers import AutoModelForCausalLM

    from moe_fair.engines.streaming import StreamingEngine
    from moe_fair.moe.blocks import find_blocks
    from moe_fair.moe.calibration_text import CalibrationSet
    from moe_fair.moe.checkpoint_source import Checkpoint
    from moe_fair.moe.collector import ExpertCollector
    from moe_fair.moe.engine_choice import start
    from moe_fair.moe.statistics import collecting, unasked

    shape, config = small(kind)
    sequences, length, domains = 8, 64, 2
    tokens = sequences * length
    torch.manual_seed(0)
    with tempfile.TemporaryDirectory() as folder:
        # random weights must not route all alike: matrices of a usual size
        model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
        model.save_pretrained(folder)
        source = Checkpoint(folder)
        yield "parameters", shape.parameters(), source.size.parameters
        text = CalibrationSet(
            tuple(f"domain {d}" for d in range(domains)),
            tuple(
                (tuple(torch.randint(1, 4096, (length,)).tolist()), i % domains)
                for i in range(sequences)
            ),
        )
        engine, hollow = start(source, "streaming", "float32", "cpu", lambda *a: a[2])
        assert isinstance(engine, StreamingEngine)
        hollow.set_experts_implementation("eager")  # one product per expert: what counters know
        hollow.set_attn_implementation("eager")
        wanted = collecting(unasked("always", "usual"), ["counterfactual"])
        collector = ExpertCollector(find_blocks(hollow), source.groups, text.domains, wanted)
        held = _watch_activations()
        with collector, FlopCounterMode(display=False) as counter:
            engine.run(text.batches(4), collector)
        with engine.layered.layer(shape.layers - 1) as layer:
            weights = sum(p.nbytes for p in layer.parameters())
        yield "bytes of one layer, float32", shape.moe_layer() * 4, weights
        read = engine.bytes_read - sum(
            t.bytes for t in engine.layered._stored[shape.layers - 1]
        )  # that of the look at one layer just now
        yield "bytes read", bytes_read(shape), read
        yield "FLOPs", flops(shape, tokens, length, extra=0), counter.get_total_flops()
        yield "boundary activations", activation_bytes(shape, tokens, 4), held.total
        # FLOPs were counted without the removals; statistics are counted with them
        collector = ExpertCollector(find_blocks(hollow), source.groups, text.domains)
        with collector:
            engine.run(text.batches(4), collector)
        packed = sum(t.nbytes for t in collector.statistics().pack()[1].values())
        yield "statistics", statistics_bytes(shape, domains, sequences), packed


class _Held:
    total = 0


def _watch_activations() -> _Held:
    """Count what the streaming engine keeps between its passes."""
    from moe_fair.engines.boundaries import Boundaries

    held, put = _Held(), Boundaries.put

    def counting(self: Any, key: tuple[int, int], tensor: Any) -> None:
        held.total += tensor.numel() * tensor.element_size()
        put(self, key, tensor)

    Boundaries.put = counting  # type: ignore[method-assign]
    return held


def real_parameters() -> Iterator[tuple[str, float, float]]:
    """The published sizes: (model, by the formula, by transformers' own class without weights)."""
    import torch
    from transformers import AutoModelForCausalLM, DeepseekV3Config, Qwen3MoeConfig

    qwen, deepseek, kimi = SHAPES
    configs = {
        qwen: Qwen3MoeConfig(
            vocab_size=151936, hidden_size=4096, intermediate_size=12288, num_hidden_layers=94,
            num_attention_heads=64, num_key_value_heads=4, head_dim=128, num_experts=128,
            num_experts_per_tok=8, moe_intermediate_size=1536, tie_word_embeddings=False,
        ),
    }  # fmt: skip
    for s, dense, heads in ((deepseek, 3, 128), (kimi, 1, 64)):
        configs[s] = DeepseekV3Config(
            vocab_size=s.vocabulary, hidden_size=7168, intermediate_size=18432,
            moe_intermediate_size=2048, num_hidden_layers=61, num_attention_heads=heads,
            num_key_value_heads=heads, n_shared_experts=1, n_routed_experts=s.experts,
            first_k_dense_replace=dense, q_lora_rank=1536, kv_lora_rank=512,
            qk_rope_head_dim=64, v_head_dim=128, qk_nope_head_dim=128,
            tie_word_embeddings=False, n_group=1, topk_group=1,
        )  # fmt: skip
    for shape, config in configs.items():
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(config)
        yield shape.name, shape.parameters(), sum(p.numel() for p in model.parameters())


def check() -> Iterator[str]:
    """Markdown: formula, measurement, their ratio."""
    yield "| model | term | formula | measured | ratio |\n|---|---|---|---|---|"
    for name, formula, found in real_parameters():
        yield f"| {name} | parameters | {formula:,} | {found:,} | {formula / found:.5f} |"
    for kind in ("qwen3_moe", "deepseek_v3"):
        for term, formula, found in measured(kind):
            ratio = formula / found
            yield f"| small {kind} | {term} | {formula:,.0f} | {found:,.0f} | {ratio:.4f} |"


def main() -> None:
    """Print one or the other."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--check", action="store_true", help="terms against measurements")
    parser.add_argument("--sequences", type=int, default=128)
    parser.add_argument("--length", type=int, default=2048)
    parser.add_argument("--domains", type=int, default=4)
    args = parser.parse_args()
    for line in check() if args.check else tables(args.sequences, args.length, args.domains):
        print(line, flush=True)


if __name__ == "__main__":
    main()
