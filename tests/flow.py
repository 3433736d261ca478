"""One tiny checkpoint through everything that a family must pass."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any

import torch
from collected import FORWARD, VECTORS, families
from masking import masked
from torch import Tensor, nn
from torch.nn import functional as F

from moe_fair.core.units import Statistics
from moe_fair.engines.auto import auto_class
from moe_fair.engines.batch import Batch
from moe_fair.engines.layers import LayeredModel
from moe_fair.engines.loaded import LoadedLayers
from moe_fair.engines.resident import ResidentEngine
from moe_fair.engines.streaming import StreamingEngine
from moe_fair.moe.blocks import MoeBlock, find_blocks
from moe_fair.moe.checkpoint_source import Checkpoint
from moe_fair.moe.checkpoint_writer import write_model
from moe_fair.moe.collector import ExpertCollector
from moe_fair.moe.surgery import cut
from moe_fair.moe.trial import trial_losses

DOMAINS = ("a", "b")
# (experts module, e, x [n, D], weight g [n, 1]) -> f_e(x) [n, D] such that g f_e(x) is what e adds
Expert = Callable[[Any, int, Tensor, Tensor], Tensor]
# (experts, input [T, D], ids [T, K], weights [T, K], routed output [T, D]) of each block
Calls = list[tuple[nn.Module, Tensor, Tensor, Tensor, Tensor]]
# (model, kept) -> a context in which the model's routers do not choose the others
Without = Callable[[Any, Mapping[str, Sequence[int]]], AbstractContextManager[None]]


def original(checkpoint: Checkpoint) -> Any:
    """The model in float32, as stock transformers loads it."""
    auto = auto_class(checkpoint.config)
    config = copy.deepcopy(checkpoint.config)
    return auto.from_pretrained(checkpoint.path, config=config, dtype=torch.float32).eval()


def batches() -> list[Batch]:
    """Two unequal batches; one has padding."""
    g = torch.Generator().manual_seed(3)
    ids = torch.randint(3, 128, (3, 24), generator=g)
    mask = torch.ones_like(ids)
    mask[1, 15:] = 0
    first = Batch(ids, mask, torch.arange(3), 0)
    return [first, Batch(ids[:2, :9], mask[:2, :9], torch.arange(3, 5), 1)]


def collect(checkpoint: Checkpoint, model: Any, engine: Any) -> Statistics:
    """Statistics of `batches()`."""
    collector = ExpertCollector(find_blocks(model), checkpoint.groups, DOMAINS, families())
    with collector:
        engine.run(batches(), collector)
    return collector.statistics()


def some(block: MoeBlock, index: int, uniform: bool) -> list[int]:
    """Kept ids: half of every routing group, or one more in every second layer."""
    run = block.num_experts // block.n_group
    count = max(block.floor() // block.n_group, run // 2) + (0 if uniform else index % 2)
    g = torch.Generator().manual_seed(index)
    chosen = [torch.randperm(run, generator=g)[:count] + r * run for r in range(block.n_group)]
    return sorted(int(i) for c in chosen for i in c)


def kept_experts(checkpoint: Checkpoint, uniform: bool) -> dict[str, list[int]]:
    """What `check_cut` keeps of every block."""
    return {b.name: some(b, i, uniform) for i, b in enumerate(checkpoint.blocks)}


def check_streaming(checkpoint: Checkpoint) -> None:
    """A layer at a time gives the statistics of the whole model, bit for bit."""
    model = original(checkpoint)
    resident = collect(checkpoint, model, ResidentEngine(model))
    layered = LayeredModel(
        checkpoint.path, checkpoint.config, dtype=torch.float32, device=torch.device("cpu")
    )
    engine = StreamingEngine(layered, device_bytes=20_000)
    streaming = collect(checkpoint, layered.model, engine)
    for group in resident.groups:
        assert torch.equal(resident.rows[group.name], streaming.rows[group.name])
        for name, value in resident.sums[group.name].items():
            assert torch.equal(value, streaming.sums[group.name][name]), (group.name, name)
        assert resident.sums[group.name]["tokens"].sum() > 0
        assert resident.rows[group.name].abs().sum() > 0


def fused_expert(m: Any, e: int, x: Tensor, g: Tensor) -> Tensor:
    """f_e(x), whatever g, as the fused contract defines it, by one expert's slices at a time."""

    def linear(x: Tensor, name: str) -> Tensor:
        w = getattr(m, name)[e]
        y = x @ w if m.is_transposed else x @ w.T
        return y + getattr(m, name + "_bias")[e] if m.has_bias else y

    if m.has_gate:
        return linear(m._apply_gate(linear(x, "gate_up_proj")), "down_proj")
    return linear(m.act_fn(linear(x, "up_proj")), "down_proj")


@contextmanager
def fused_calls(model: Any) -> Iterator[Calls]:
    """What every experts module of the contract is called with and gives, seen from outside."""
    calls: Calls = []
    handles = [
        b.experts.register_forward_hook(lambda m, args, out: calls.append((m, *args, out)))
        for b in find_blocks(model)
    ]
    yield calls
    for h in handles:
        h.remove()


def check_naive(
    checkpoint: Checkpoint,
    implementation: str | None,
    expert: Expert = fused_expert,
    recorded: Callable[[Any], Any] = fused_calls,
) -> None:
    """Every statistic equals a loop over layers and experts; Σt equals w·dL/dw of down_proj.

    Args:
        implementation: of the stock experts, where the family can choose.
        expert, recorded: how the loop computes one expert, and sees what the experts are given.
    """
    model = original(checkpoint)
    if implementation:
        model.set_experts_implementation(implementation)
    got = collect(checkpoint, model, ResidentEngine(model))
    blocks = find_blocks(model)
    want: dict[str, dict[str, Tensor]] = {b.name: {} for b in blocks}
    for batch in batches():
        with recorded(model) as calls, torch.no_grad():
            model(batch.input_ids, attention_mask=batch.mask)
        assert len(calls) == len(blocks)
        for block, call in zip(blocks, calls, strict=True):
            for name, (e, v) in _naive(block, batch, call, expert):
                shape = (len(DOMAINS), block.num_experts, *v.shape)
                zeros = torch.zeros(shape, dtype=torch.float64)
                want[block.name].setdefault(name, zeros)[batch.domain, e] += v
    for block in blocks:
        for name in (*FORWARD, *VECTORS):
            a, b = got.sums[block.name][name], want[block.name][name]
            # float32 experts summed in another order; 1 - cos(x, x + y) magnifies that
            limit = 1e-4 if name == "turned_norm" else 1e-5
            assert (a - b).abs().max() <= limit * b.abs().max(), (block.name, name)
        assert got.sums[block.name]["tokens"].sum() == block.top_k * sum(
            int(b.mask.sum()) for b in batches()
        )
    for block, want_taylor in zip(blocks, _weight_taylor(model, blocks), strict=True):
        have = got.sums[block.name]["taylor"]
        assert (have - want_taylor).abs().max() <= 1e-4 * want_taylor.abs().max(), block.name


def _naive(
    block: MoeBlock, batch: Batch, call: Any, expert: Expert
) -> Iterator[tuple[str, tuple[int, Tensor]]]:
    m, x, ids, weights, out = call
    x, out, ids, weights = (t.reshape(-1, t.shape[-1]) for t in (x, out, ids, weights))
    counted = batch.mask.flatten().bool()
    for e in range(block.num_experts):
        token, slot = torch.where((ids == e) & counted[:, None])
        if not len(token):
            continue
        weight = weights[token, slot]
        g, f = weight.double(), expert(m, e, x[token], weight[:, None]).double()
        n, xd, yd = f.norm(dim=1), x[token].double(), out[token].double()
        turn = 1 - (xd * (xd + yd)).sum(1) / (xd.norm(dim=1) * (xd + yd).norm(dim=1))
        values = {
            "tokens": torch.ones_like(n), "gate": g, "gate_sq": g**2, "norm": n, "norm_sq": n**2,
            "gated_norm": g * n, "gated_norm_sq": (g * n) ** 2, "turned_norm": g * n * turn,
            "output": f, "output_sq": f**2,
        }  # fmt: skip
        for name, v in values.items():
            yield name, (e, v.sum(0))


def _weight_taylor(model: Any, blocks: list[MoeBlock]) -> Iterator[Tensor]:
    """Σ over down_proj (and its bias) of w · dL/dw, [domains, E]: f_e is linear in them."""
    last = [
        [p for n, p in b.experts.named_parameters() if n.split(".")[-1].startswith(("down", "w2"))]
        for b in blocks
    ]
    totals = [torch.zeros(len(DOMAINS), b.num_experts, dtype=torch.float64) for b in blocks]
    for batch in batches():
        for p in (p for ps in last for p in ps):
            p.requires_grad_(True).grad = None
        logits = model(batch.input_ids, attention_mask=batch.mask).logits
        for row, ids, mask in zip(logits, batch.input_ids, batch.mask, strict=True):
            n = int(mask.sum())
            F.cross_entropy(row[: n - 1], ids[1:n]).backward(retain_graph=True)
        for total, ps, b in zip(totals, last, blocks, strict=True):
            assert ps
            for p in ps:
                total[batch.domain] += (p * p.grad).detach().double().view(b.num_experts, -1).sum(1)
    yield from totals


def check_counterfactual(
    checkpoint: Checkpoint,
    recorded: Callable[[Any], Any] = fused_calls,
    without: Without = masked,
) -> None:
    """Σ ‖Δ_e‖² is what the last block's output changes by when its router cannot see e."""
    model = original(checkpoint)
    blocks = find_blocks(model)
    wanted = families("counterfactual")
    with ExpertCollector(blocks, checkpoint.groups, DOMAINS, wanted) as collector:
        ResidentEngine(model).run(batches(), collector)
    block = blocks[-1]
    got = collector.statistics().sums[block.name]["removed_error"]
    want = torch.zeros_like(got)

    def output(batch: Batch) -> Tensor:
        with recorded(model) as calls, torch.no_grad():
            model(batch.input_ids, attention_mask=batch.mask)
        y: Tensor = calls[-1][-1]
        return y.reshape(-1, y.shape[-1])[batch.mask.flatten().bool()].double()

    for batch in batches():
        y = output(batch)
        for e in range(block.num_experts):
            others = [i for i in range(block.num_experts) if i != e]
            with without(model, {block.name: others}):
                want[batch.domain, e] += (output(batch) - y).square().sum()
    assert want.max() > 0
    assert (got - want).abs().max() <= 1e-4 * want.max()


def check_cut(checkpoint: Checkpoint, folder: Path, uniform: bool) -> Any:
    """Cut on disk = cut in memory = the original whose router cannot see the removed experts.

    Returns:
        the loaded result.
    """
    kept = kept_experts(checkpoint, uniform)
    write_model(checkpoint, kept, folder)
    stock = not (folder / "modeling_moe_fair.py").exists()
    result = Checkpoint(str(folder))
    loaded, info = auto_class(result.config).from_pretrained(
        folder,
        dtype=torch.float32,
        trust_remote_code=None if stock else True,
        output_loading_info=True,
    )
    loaded.eval()
    assert not any(info.values()), info
    reference = original(checkpoint)
    cut(reference, kept)
    a, b = reference.state_dict(), loaded.state_dict()
    assert a.keys() == b.keys()
    assert all(torch.equal(a[k], b[k]) for k in a)
    _check_sizes(checkpoint, result, kept)

    batch = batches()[0]
    whole = original(checkpoint)
    with torch.no_grad():
        logits = loaded(batch.input_ids, attention_mask=batch.mask).logits
        with masked(whole, kept):
            expected = whole(batch.input_ids, attention_mask=batch.mask).logits
        unmasked = whole(batch.input_ids, attention_mask=batch.mask).logits
    seen = batch.mask.bool()
    assert (logits - expected)[seen].abs().max() <= 2e-5 * expected.abs().max().clamp(min=1)
    assert (logits - unmasked)[seen].abs().max() > 1e-3
    return loaded


def _check_sizes(before: Checkpoint, after: Checkpoint, kept: dict[str, list[int]]) -> None:
    """What a plan says of the result's size is what lies on disk."""
    planned = before.size.without(before.groups, {n: len(ids) for n, ids in kept.items()})
    assert planned == after.size


def check_generation(
    loaded: Any, implementations: tuple[str, ...] = ("eager", "grouped_mm")
) -> None:
    """Greedy text is one and the same with and without cache, whatever runs the experts."""
    prompt = batches()[0].input_ids[:1, :6]
    texts = []
    for implementation in implementations or ("",):
        if implementation:
            loaded.set_experts_implementation(implementation)
        texts += [
            loaded.generate(
                prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=5, do_sample=False,
                use_cache=cache,
            ).tolist()
            for cache in (True, False)
        ]  # fmt: skip
    assert all(t == texts[0] for t in texts), texts
    assert len(texts[0][0]) > prompt.shape[1]


def summed(model: Any) -> torch.Tensor:
    """[N] summed losses of each sequence of `batches()`, written anew."""
    found = []
    for b in batches():
        with torch.no_grad():
            logits = model(b.input_ids, attention_mask=b.mask, use_cache=False).logits
        for row, ids, mask in zip(logits.double(), b.input_ids, b.mask, strict=True):
            n = int(mask.sum())
            found.append(F.cross_entropy(row[: n - 1], ids[1:n], reduction="sum"))
    return torch.stack(found)


def removals(source: Checkpoint, uniform: bool) -> dict[str, list[int]]:
    kept = kept_experts(source, uniform)
    sizes = {b.name: b.num_experts for b in source.blocks}
    return {n: [e for e in range(sizes[n]) if e not in ids] for n, ids in kept.items()}


def check_trial(source: Checkpoint) -> None:
    """In memory and streamed: the losses of masked models, whatever the router."""
    model = original(source)
    plans = [removals(source, True), removals(source, False)]
    found, counts = trial_losses(StreamingEngine(LoadedLayers(model)), batches(), plans)
    wanted = [summed(model)]
    for plan in plans:
        sizes = {b.name: b.num_experts for b in source.blocks}
        kept = {n: [e for e in range(sizes[n]) if e not in gone] for n, gone in plan.items()}
        with masked(model, kept):
            wanted.append(summed(model))
    torch.testing.assert_close(found, torch.stack(wanted), rtol=1e-5, atol=1e-5)
    assert float((found[1:] - found[0]).abs().min()) > 0
    assert counts.tolist() == [23, 14, 23, 8, 8]
    layered = LayeredModel(
        source.path, source.config, dtype=torch.float32, device=torch.device("cpu")
    )
    again, _ = trial_losses(StreamingEngine(layered), batches(), plans)
    assert torch.equal(again, found)
    assert torch.equal(summed(model), wanted[0])  # the model is as it was
