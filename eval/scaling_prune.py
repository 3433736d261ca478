"""What the stages of a default `prune` cost: FLOPs, the optimizer's bytes, peak on a device.

    python eval/scaling_prune.py          # the table of eval/SCALING.md
    python eval/scaling_prune.py --check  # every term against a count, at a shape that fits here

Qwen1.5-MoE-A2.7B, 60 experts to 40, 512 sequences of 512 tokens, the model in memory, bfloat16. The
terms are written out below, one function each. Products are what torch's counter counts; Cholesky
factors and triangular solves, which it does not know, are in `factors` by the textbook's numbers.
"""

from __future__ import annotations

import argparse
import copy
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

from scaling import SHAPES, Shape, forward_flops, head_flops

from moe_fair.moe.judging import HELD_OUT
from moe_fair.moe.repairs.refit import SWEEPS, ridges
from moe_fair.pipelines.rivals import RIVALS

QWEN = Shape("Qwen1.5-MoE-A2.7B", 24, 0, 2048, 1408, 5632, 60, 4, 4, 16, 16, 128, 128, 151936)


@dataclass(frozen=True)
class Run:
    """A default run, by its numbers.

    Attributes:
        kept: experts that stay, of every layer.
        plans: tried beside the original, on so many of the sequences; as many teach their fits.
        step: sequences to a batch of the repair.
    """

    sequences: int = 512
    length: int = 512
    kept: int = 40
    plans: int = 1 + len(RIVALS)
    tried: int = 64
    taught: int = 64
    step: int = 2
    epochs: int = 4

    @property
    def tokens(self) -> int:
        return self.sequences * self.length

    @property
    def judging(self) -> int:
        """Tokens of the sequences that judge fits: every fifth."""
        return self.sequences // HELD_OUT * self.length


def block_weights(s: Shape, kept: int) -> int:
    """Of a cut layer's MoE block: experts, shared experts and their gate, router."""
    return (kept + s.shared) * 3 * s.model * s.expert + s.model * (kept + bool(s.shared))


def attention_flops(s: Shape, length: int) -> float:
    """Of one token in one layer."""
    return 2 * s.attention() + 2 * length * s.heads * (s.head + s.value_head)


def block_flops(s: Shape, kept: int, routed: bool = True) -> float:
    """Of one token in one MoE block, forward."""
    active = (s.top_k if routed else 0) + s.shared
    return 2 * (3 * s.model * s.expert * active + s.model * (kept + bool(s.shared)))


def collection(s: Shape, r: Run) -> float:
    """Forward, gradients of activations in all layers but the first, whose input no statistic asks
    about, and one more candidate a token for removals."""
    tokens = (r.sequences - r.tried) * r.length
    once = forward_flops(s, tokens, r.length) + tokens * 2 * s.layers * s.model * bool(s.shared)
    scores = tokens * s.layers * 2 * r.length * s.heads * (s.head + s.value_head)
    more = 2 * tokens * s.layers * 3 * s.model * s.expert
    back = (once + scores) * (s.layers - 1) / s.layers
    return once + back + 2 * head_flops(s, tokens) + more


def trials(s: Shape, r: Run) -> float:
    """The original and plans forward, a fit of every layer with one ridge and one sweep for each
    plan, and the losses of the sequences that judge."""
    plans, judge = r.plans, r.tried
    tokens, learn = (judge + r.taught) * r.length, r.taught * r.length
    once = forward_flops(s, tokens, r.length) + tokens * 2 * s.layers * s.model * bool(s.shared)
    down = 2 * s.top_k * s.expert * s.model
    fit = 2 * tokens * down + 3 * learn * down + tokens * down
    fit += learn * 2 * s.top_k * s.expert**2  # Gram matrices
    look = r.step * r.length * (2 * attention_flops(s, r.length) + 2 * block_flops(s, s.experts))
    heads = (1 + plans) * head_flops(s, judge * r.length)
    return (1 + plans) * once + plans * s.layers * fit + s.layers * look + heads


def forwards(s: Shape, r: Run) -> float:
    """Of the repair: the original's layer; attention, router and shared experts of the cut one;
    and its repaired block. A few batches find out how the layer is built."""
    attention, whole = attention_flops(s, r.length), block_flops(s, s.experts)
    each = attention + whole + attention + block_flops(s, r.kept, False) + block_flops(s, r.kept)
    look = r.step * r.length * (3 * (attention + whole) + attention + whole / 2)
    return s.layers * (r.tokens * each + look)


def refit(s: Shape, r: Run) -> float:
    """Products of one fit for each ridge, and one on all tokens, of every layer."""
    once = 2 * s.top_k * s.expert * s.model  # of a token: hidden activations to outputs, or back
    gram = 2 * s.top_k * s.expert**2
    learn, judge = r.tokens - r.judging, r.judging
    sweeps = 2 * SWEEPS * len(ridges)
    products = 2 * r.tokens * once  # hidden activations
    products += judge * once * (1 + len(ridges)) + learn * once * (1 + sweeps)
    products += r.tokens * once * (2 + 2)
    return s.layers * (products + r.tokens * gram)


def factors(s: Shape, r: Run, ridged: int = len(ridges) + 1, solves: int = 0) -> float:
    """Cholesky factors for each ridge and once more, and their solves."""
    solves = solves or SWEEPS * len(ridges) + 1
    each = ridged * s.expert**3 / 3 + solves * 2 * s.expert**2 * s.model
    return s.layers * r.kept * each


def tried_factors(s: Shape, r: Run) -> float:
    """Of one ridge and one sweep, of every plan."""
    return r.plans * factors(s, r, ridged=1, solves=1)


def distill(s: Shape, r: Run) -> float:
    """Every epoch a block's forward and the gradients of its weights and of what goes into the
    down projections; what judges is run at the start, at one look and after every epoch."""
    forward = block_flops(s, r.kept)
    down = 2 * (s.top_k + s.shared) * s.expert * s.model
    learn = (r.tokens - r.judging) * r.epochs * (2 * forward + down)
    return s.layers * (learn + r.judging * forward * (2 + r.epochs))


STAGES: dict[str, Callable[[Shape, Run], float]] = {
    "collection": collection,
    "trials": lambda s, r: trials(s, r) + tried_factors(s, r),
    "repair: forwards": forwards,
    "repair: refit": lambda s, r: refit(s, r) + factors(s, r),
    "repair: distill": distill,
}


def optimizer_bytes(s: Shape, r: Run, item: int = 2) -> int:
    """Of one step: AdamW reads weights, gradients and two moments and writes all but gradients, in
    float32; gradients of the weights' own type are written by the backward, read for their norm
    and made float32; the weights that run are written anew."""
    return block_weights(s, r.kept) * (7 * 4 + 2 * item + 2 * (item + 4))


def streams_bytes(s: Shape, r: Run, item: int = 2) -> int:
    """Hidden states of the original, the rest of the pruned layers' outputs, and what goes into
    the block: on the device, or in main memory where it does not fit."""
    return 3 * r.tokens * s.model * item


def refit_bytes(s: Shape, r: Run, item: int = 2, keep: bool = True) -> int:
    """Peak of a fit beside weights and streams: inputs, target, outputs and residual; weights of
    the block's down projections: stock, moving, yielded and, where there is room, the best and the
    fit on all tokens; hidden activations and Gram matrices where they are kept."""
    text = r.tokens * (s.model * (item + 3 * 4) + s.top_k * (8 + item))
    down = r.kept * s.expert * s.model * 4
    held = r.tokens * s.top_k * s.expert * item + 2 * r.kept * s.expert**2 * 4
    return text + (5 if keep else 3) * down + (held if keep else r.kept * s.expert**2 * 4)


def distill_bytes(s: Shape, r: Run, item: int = 2, parts: int = 1) -> int:
    """Peak of training beside weights and streams: float32 weights, their best, gradients and two
    moments; weights that run and their gradients; the fit on all tokens. In parts of the experts
    the whole tensors that run and their gradients come on top."""
    weights = block_weights(s, r.kept)
    whole = 2 * item * weights if parts > 1 else 0
    return weights * (5 * 4 + 2 * item) // parts + whole + r.kept * s.expert * s.model * item


def table(s: Shape = QWEN, r: Run | None = None) -> Iterator[str]:
    """Markdown."""
    r = r or Run()
    yield "| stage | PFLOP |\n|---|---|"
    for name, term in STAGES.items():
        yield f"| {name} | {term(s, r) / 1e15:.1f} |"
    yield f"| all | {sum(t(s, r) for t in STAGES.values()) / 1e15:.1f} |"
    yield f"\nOptimizer's traffic a step: {optimizer_bytes(s, r) / 1e9:.1f} GB.\n"
    yield "| bytes on the device beside the model | GB |\n|---|---|"
    yield f"| streams of hidden states | {streams_bytes(s, r) / 1e9:.1f} |"
    yield f"| a cut layer's weights | {block_weights(s, r.kept) * 2 / 1e9:.1f} |"
    yield f"| refit | {refit_bytes(s, r) / 1e9:.1f} |"
    yield f"| refit, nothing kept | {refit_bytes(s, r, keep=False) / 1e9:.1f} |"
    yield f"| distill | {distill_bytes(s, r) / 1e9:.1f} |"
    yield "\nMost at a time, a layer at a time and streams in main memory:\n"
    yield "| model | a cut layer, GB | with a fit, nothing kept | with training, in parts |"
    yield "|---|---|---|---|"
    deepseek = next(x for x in SHAPES if x.name.startswith("DeepSeek"))
    for its, kept, parts in ((s, r.kept, 1), (deepseek, 171, 16)):
        of = replace(r, kept=kept)
        layer = 2 * (block_weights(its, kept) + its.attention()) / 1e9
        fitted = layer + refit_bytes(its, of, keep=False) / 1e9
        trained = layer + distill_bytes(its, of, parts=parts) / 1e9
        yield f"| {its.name} | {layer:.1f} | {fitted:.1f} | {trained:.1f}, {parts} |"


# ---- every term against a count --------------------------------------------------------------


def small() -> tuple[Shape, Any]:
    """A model of this type that fits here, and its shape."""
    from transformers import Qwen2MoeConfig

    config = Qwen2MoeConfig(
        vocab_size=512, hidden_size=64, num_hidden_layers=2, intermediate_size=96,
        moe_intermediate_size=48, shared_expert_intermediate_size=96, num_attention_heads=4,
        num_key_value_heads=4, num_experts=12, num_experts_per_tok=2, decoder_sparse_step=1,
        qkv_bias=False, pad_token_id=0, bos_token_id=0, eos_token_id=0, tie_word_embeddings=False,
    )  # fmt: skip
    return Shape("small", 2, 0, 64, 48, 96, 12, 2, 2, 4, 4, 16, 16, 512), config


def measured() -> Iterator[tuple[str, float, float]]:
    """(term, by the formula, as counted) of one small model in float32."""
    import torch
    from torch.utils.flop_counter import FlopCounterMode
    from transformers import AutoModelForCausalLM

    from moe_fair.engines.batch import Batch
    from moe_fair.engines.loaded import LoadedLayers
    from moe_fair.engines.resident import ResidentEngine
    from moe_fair.engines.streaming import StreamingEngine
    from moe_fair.moe import repair
    from moe_fair.moe.blocks import find_blocks
    from moe_fair.moe.collector import ExpertCollector
    from moe_fair.moe.repaired_trial import repaired_losses
    from moe_fair.moe.repairs import refit as refitting
    from moe_fair.moe.statistics import collecting, unasked

    shape, config = small()
    r = Run(sequences=20, length=12, kept=8, plans=2, tried=4, step=2, epochs=1)
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    model.requires_grad_(False)
    model.set_experts_implementation("eager")  # one product per expert: what counters know
    model.set_attn_implementation("eager")
    ids = torch.randint(1, 512, (r.sequences, r.length))
    rows = [torch.arange(i, i + r.step) for i in range(0, r.sequences, r.step)]
    batches = [Batch(ids[at], torch.ones_like(ids[at]), at, 0) for at in rows]
    held = batches[: r.tried // r.step]
    learned = batches[r.tried // r.step :]

    without = copy.deepcopy(model)
    blocks = find_blocks(without)
    groups = [b.unit_group(4) for b in blocks]
    wanted = collecting(unasked("always", "usual"), ["counterfactual"])
    collector = ExpertCollector(blocks, groups, ("all",), wanted)
    with collector, FlopCounterMode(display=False) as counter:
        ResidentEngine(without).run(learned, collector, backward=True)
    more = 2 * (r.tokens - r.tried * r.length) * shape.layers * 3 * shape.model * shape.expert
    yield "collection, without removals", collection(shape, r) - more, counter.get_total_flops()

    engine = StreamingEngine(LoadedLayers(copy.deepcopy(model)))
    names = [b.name for b in blocks]
    gone = [{n: [p, 11] for n in names} for p in range(r.plans)]
    with FlopCounterMode(display=False) as counter:
        repaired_losses(engine, learned[:3], held, gone)
    told = trials(shape, replace(r, taught=3 * r.step))
    yield "trials", told, counter.get_total_flops()

    kept = {n: list(range(r.kept)) for n in names}
    counts = {"fit": 0.0, "distill": 0.0}

    def counted(name: str, work: Callable[..., Any]) -> Callable[..., Any]:
        def run(*arguments: Any, **keywords: Any) -> Any:
            with FlopCounterMode(display=False) as inner:
                found = work(*arguments, **keywords)
            counts[name] += inner.get_total_flops()
            return found

        return run

    stock = repair.fit_layer, repair.distill_layer, refitting.DIRECT
    refitting.path.__kwdefaults__["direct"] = 0  # as wide experts are fitted
    refitting.path.__kwdefaults__["solved"] = 0.0
    repair.fit_layer = counted("fit", stock[0])
    repair.distill_layer = counted("distill", lambda *a, **k: stock[1](*a, **k, look=False))
    repair.epochs_for, epochs = (lambda _: r.epochs), repair.epochs_for
    try:
        engine = StreamingEngine(LoadedLayers(copy.deepcopy(model)))
        with FlopCounterMode(display=False) as counter:
            repair.Repairer(engine, kept, "distill").run(batches)
    finally:
        repair.fit_layer, repair.distill_layer = stock[:2]
        repair.epochs_for = epochs
        refitting.path.__kwdefaults__.update(direct=stock[2], solved=refitting.SOLVED)
    look = shape.layers * r.judging * block_flops(shape, r.kept)
    rest = counter.get_total_flops() - counts["fit"] - counts["distill"]
    yield "repair: forwards", forwards(shape, r), rest
    yield "repair: refit", refit(shape, r), counts["fit"]
    yield "repair: distill, without the look", distill(shape, r) - look, counts["distill"]


def check() -> Iterator[str]:
    """Markdown: formula, count, their ratio."""
    yield "| term | formula | counted | ratio |\n|---|---|---|---|"
    for term, formula, found in measured():
        yield f"| {term} | {formula:,.0f} | {found:,.0f} | {formula / found:.4f} |"


def main() -> None:
    """Print one or the other."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--check", action="store_true", help="terms against counts")
    for line in check() if parser.parse_args().check else table():
        print(line, flush=True)


if __name__ == "__main__":
    main()
