"""REAM: likeness and groups against loops, neurons against brute force, the checkpoint left."""

from __future__ import annotations

import json
from itertools import permutations
from pathlib import Path
from typing import Any

import pytest
import torch
from collected import families
from flow import DOMAINS, batches, fused_calls, original
from places import EVAL
from test_merge import KINDS, SIZES, check_router, check_runs, expert_parts, kept_in_all
from tiny import tiny_model
from torch import Tensor, nn

from moe_fair.core.plan import Plan
from moe_fair.core.recipe import Recipe
from moe_fair.core.units import Statistics
from moe_fair.engines.layers import LayeredModel
from moe_fair.engines.resident import ResidentEngine
from moe_fair.engines.streaming import StreamingEngine
from moe_fair.moe.blocks import MoeBlock, find_blocks
from moe_fair.moe.checkpoint_source import Checkpoint
from moe_fair.moe.checkpoint_writer import write_model
from moe_fair.moe.collector import ExpertCollector
from moe_fair.moe.merge import check_mergeable, merged_tensors, shares_of, write_merged
from moe_fair.moe.neurons import NeuronAxis, matched, neuron_axes
from moe_fair.moe.ream import groups, likeness
from moe_fair.pipelines import moe as pipeline

SERVED = json.loads((EVAL / "families.json").read_text())["served"]


def collect(checkpoint: Checkpoint, model: Any, engine: Any, *, taylor: bool = False) -> Statistics:
    """What REAM needs of `batches()`."""
    wanted = families("similarity", taylor=taylor)
    with ExpertCollector(find_blocks(model), checkpoint.groups, DOMAINS, wanted) as collector:
        engine.run(batches(), collector, backward=taylor)
    found = collector.statistics()
    found.metadata |= {"size": {"parameters": 10**9, "bytes": 10**9}, "calibration": {}}
    return found


def planned(kind: str, folder: Path, dtype: torch.dtype = torch.float32) -> tuple[Any, Any, Plan]:
    """A tiny checkpoint, its statistics and the plan of merging a third of its experts away."""
    tiny_model(kind, **SIZES.get(kind, {})).to(dtype).save_pretrained(folder / "model")
    source = Checkpoint(str(folder / "model"))
    model = original(source)
    statistics = collect(source, model, ResidentEngine(model))
    return source, statistics, remade(source, statistics)


def remade(source: Checkpoint, statistics: Statistics, **more: Any) -> Plan:
    return pipeline.plan(statistics, Recipe(total=kept_in_all(source), reduce="ream", **more))


def shuffle(block: MoeBlock, seed: int) -> dict[str, list[Tensor]]:
    """Put every expert's neurons into an order of its own; the parts as they were."""
    g = torch.Generator().manual_seed(seed)
    before = {}
    orders: dict[int, Tensor] = {}
    for name, axis in neuron_axes(block).items():
        p = block.experts.get_parameter(name)
        parts = parts_of(p.detach(), block.num_experts)
        before[name] = [t.clone() for t in parts]
        if axis is None:
            continue
        count = parts[0].shape[axis.dim] // axis.each
        for e, t in enumerate(parts):
            if e not in orders:
                orders[e] = torch.randperm(count, generator=g)
            t.copy_(axis.permuted(t, orders[e]))
    return before


def parts_of(t: Tensor, size: int) -> list[Tensor]:
    """Views of each expert's part, without the axis of experts."""
    return list(t) if len(t) == size else list(t.chunk(size))


def check_order_is_free(kind: str) -> None:
    model = tiny_model(kind, **SIZES.get(kind, {})).eval()
    blocks = find_blocks(model)
    ids = batches()[0].input_ids
    with torch.no_grad():
        before = model(input_ids=ids).logits
        for i, block in enumerate(blocks):
            old = shuffle(block, i)
            for name, axis in neuron_axes(block).items():
                new = parts_of(block.experts.get_parameter(name).detach(), block.num_experts)
                same = [torch.equal(a, b) for a, b in zip(new, old[name], strict=True)]
                assert not any(same) if axis is not None and new[0].std() > 0 else all(same)
        after = model(input_ids=ids).logits
    assert (after - before).abs().max() <= 2e-5 * before.abs().max().clamp(min=1)


@pytest.mark.parametrize("kind", KINDS)
def test_the_order_of_neurons_is_free(kind: str) -> None:
    check_order_is_free(kind)


@pytest.mark.nightly
@pytest.mark.parametrize("kind", [k for k in SERVED if k not in KINDS])
def test_every_family_has_neurons_in_any_order_and_logits(kind: str) -> None:
    check_order_is_free(kind)
    model = tiny_model(kind).eval()
    blocks = [b for b in find_blocks(model) if b.table is None]  # of the others nothing is merged
    groups = tuple(b.unit_group(4.0) for b in blocks)
    wanted = families("similarity", taylor=False)
    with ExpertCollector(blocks, groups, DOMAINS, wanted) as collector:
        ResidentEngine(model).run(batches(), collector, backward=False)
    for sums in collector.statistics().sums.values():
        assert float(sums["router_gram"].diagonal(dim1=1, dim2=2).min()) > 0
        assert float(sums["gated_output"].abs().max()) > 0


def test_neurons_are_matched_as_by_brute_force() -> None:
    g = torch.Generator().manual_seed(0)
    up, gate = NeuronAxis(0), NeuronAxis(1, 2, apart=False)
    for _ in range(5):
        a, b = torch.randn(2, 4, 3, generator=g)  # [F, D]
        c, d = torch.randn(2, 5, 8, generator=g)  # [D, 2F], entries of a neuron side by side
        found = matched([(up, a, b), (gate, c, d)])

        def neuron(first: Tensor, second: Tensor, i: int) -> Tensor:
            parts = [first[i], *(torch.stack([s[2 * i], s[2 * i + 1]]) for s in second)]
            v = torch.cat([p.double() for p in parts])
            return v / v.norm()

        def cost(p: tuple[int, ...]) -> float:
            return sum(float((neuron(a, c, i) - neuron(b, d, j)).norm()) for i, j in enumerate(p))  # noqa: B023

        best = min(permutations(range(4)), key=cost)
        assert tuple(found.tolist()) == best


@pytest.mark.parametrize("apart", [True, False])
def test_a_known_order_is_found_again(apart: bool) -> None:
    g = torch.Generator().manual_seed(1)
    axis, order = NeuronAxis(0, 2, apart), torch.randperm(16, generator=g)
    a = torch.randn(32, 7, generator=g)
    b = axis.permuted(a, order)
    assert torch.equal(axis.permuted(b, matched([(axis, a, b)])), a)


def test_groups_equal_a_loop_and_are_capped() -> None:
    g = torch.Generator().manual_seed(2)
    near, saliency = torch.rand(40, 40, generator=g), torch.rand(40, generator=g)
    near = (near + near.T) / 2
    for kept, sizes in (([3, 9, 20], [16, 16, 8]), ([0, 1], [20, 20]), (list(range(39)), [2])):
        found = groups(near, saliency, kept)
        taken = set(kept)
        for centre in sorted(kept, key=lambda e: -saliency[e]):
            mine = []
            while len(mine) < max(16, -(-40 // len(kept))) - 1 and len(taken) < 40:
                best = max((e for e in range(40) if e not in taken), key=lambda e: near[centre, e])
                mine.append(best)
                taken.add(best)
            assert found[centre] == mine
        assert sorted(e for c, m in found.items() for e in (c, *m)) == list(range(40))
        assert sorted((len(m) + 1 for m in found.values()), reverse=True)[: len(sizes)] == sizes


@pytest.mark.parametrize("kind", ["mixtral", "gpt_oss", "qwen2_moe"])
def test_statistics_and_likeness_equal_a_loop_over_tokens(kind: str, tmp_path: Path) -> None:
    source, statistics, _ = planned(kind, tmp_path)
    model = original(source)
    size = source.blocks[0].num_experts
    logits: dict[str, list[Tensor]] = {}
    outputs = {b.name: torch.zeros(size, 64, dtype=torch.float64) for b in source.blocks}
    for batch in batches():
        real = batch.mask.flatten().bool()
        with fused_calls(model) as calls, torch.no_grad():
            model(batch.input_ids, attention_mask=batch.mask)
        for block, (_, x, ids, weights, _) in zip(find_blocks(model), calls, strict=True):
            router: Any = block.router
            bias = getattr(router, "bias", None)
            z = nn.functional.linear(x, router.weight, bias)[real].detach()
            logits.setdefault(block.name, []).append(z.double())
            for t in real.nonzero().flatten().tolist():
                for e, w in zip(ids[t].tolist(), weights[t].tolist(), strict=True):
                    f = block.outputs(block.experts.forward, x[t : t + 1], torch.tensor([e]),
                                      torch.ones(1))  # fmt: skip
                    outputs[block.name][e] += w * f[0].detach().double()
    for group in statistics.groups:
        z, o = torch.cat(logits[group.name]), outputs[group.name]
        view = statistics.view(group)
        torch.testing.assert_close(view["router_gram"], z.T @ z, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(view["gated_output"], o, rtol=1e-4, atol=1e-5)
        unit = z / z.norm(dim=0)
        apart = torch.tensor([[float((a - b).norm()) for b in unit.T] for a in unit.T])
        near = torch.tensor([[float(torch.cosine_similarity(a, b, dim=0)) for b in o] for a in o])
        wanted = (1 - apart / apart.max() + (near + 1) / 2) / 2
        torch.testing.assert_close(likeness(view).float(), wanted, rtol=0, atol=1e-4)


@pytest.mark.parametrize("kind", KINDS)
def test_statistics_are_the_same_streamed(kind: str, tmp_path: Path) -> None:
    source, forward, plan = planned(kind, tmp_path)
    model = original(source)
    resident = collect(source, model, ResidentEngine(model), taylor=True)
    layered = LayeredModel(
        source.path, source.config, dtype=torch.float32, device=torch.device("cpu")
    )
    engine = StreamingEngine(layered, device_bytes=20_000)
    streaming = collect(source, layered.model, engine, taylor=True)
    for name, sums in forward.sums.items():
        assert all(torch.equal(v, resident.sums[name][n]) for n, v in sums.items())
    for name, sums in resident.sums.items():
        assert {"router_gram", "gated_output"} <= sums.keys()
        for statistic, value in sums.items():
            assert torch.equal(value, streaming.sums[name][statistic]), (name, statistic)
    assert remade(source, streaming).groups == plan.groups


@pytest.mark.parametrize("kind", KINDS)
def test_merged_weights_equal_a_sum_by_hand_in_stock_transformers(
    kind: str, tmp_path: Path
) -> None:
    source, statistics, plan = planned(kind, tmp_path)
    assert plan.merges
    assert plan.aligned
    assert plan.uniform
    check_mergeable(source, aligned=True)
    write_merged(source, plan, tmp_path / "merged")
    write_model(source, plan.kept, tmp_path / "out", merged=tmp_path / "merged")
    result = original(Checkpoint(str(tmp_path / "out")))
    before, after = original(source).state_dict(), result.state_dict()
    moved = 0
    for block, group in zip(source.blocks, plan.groups, strict=True):
        view = statistics.view(next(g for g in statistics.groups if g.name == group.name))
        saliency = view["gated_norm"] / view["tokens"].clamp(min=1)
        least = saliency[saliency > 0].min()
        [new_block] = [b for b in Checkpoint(str(tmp_path / "out")).blocks if b.name == block.name]
        old, new = expert_parts(before, block), expert_parts(after, new_block)
        axes = neuron_axes(block)
        squeezed = {n: [_own(t, axes[n]) for t in parts] for n, parts in old.items()}
        for place, kept in enumerate(group.kept):
            members = [int(m) for m in group.merged.get(str(kept), {kept: 1})]
            total = sum(float(saliency[m].clamp(min=least)) for m in members)
            orders = {m: _matched(squeezed, axes, kept, m) for m in members}
            moved += sum(order != sorted(order) for order in orders.values())
            for name, parts in squeezed.items():
                by_hand = torch.zeros_like(parts[kept], dtype=torch.float64)
                for m, order in orders.items():
                    part = _in_order(parts[m], axes[name], order)
                    by_hand += float(saliency[m].clamp(min=least)) / total * part.double()
                got = _own(new[name][place], axes[name]).double()
                torch.testing.assert_close(got, by_hand, rtol=1e-5, atol=1e-7)
        check_router(block, group.kept, before, after)
    assert moved
    check_runs(result)


def _own(t: Tensor, axis: NeuronAxis | None) -> Tensor:
    """An expert's part without a first axis of one."""
    return t[0] if t.shape[0] == 1 else t


def _neuron(t: Tensor, axis: NeuronAxis, i: int) -> Tensor:
    """The entries of one neuron, found anew."""
    rows = t if axis.dim == 0 else t.T
    count = len(rows) // axis.each
    at = [i + b * count if axis.apart else i * axis.each + b for b in range(axis.each)]
    return torch.stack([rows[j] for j in at])


def _matched(parts: Any, axes: Any, kept: int, other: int) -> list[int]:
    """The least sum of distances between neurons, by scipy on distances one by one."""
    from scipy.optimize import linear_sum_assignment

    if kept == other:
        axis = next(a for a in axes.values() if a is not None)
        t = next(parts[n][kept] for n, a in axes.items() if a is axis)
        return list(range(t.shape[axis.dim] // axis.each))
    some = [(n, a) for n, a in axes.items() if a is not None]
    count = parts[some[0][0]][kept].shape[some[0][1].dim] // some[0][1].each
    units = []
    for e in (kept, other):
        every = [torch.cat([_neuron(parts[n][e], a, i).flatten() for n, a in some]).double()
                 for i in range(count)]  # fmt: skip
        units.append([v / v.norm() for v in every])
    cost = torch.stack([(u - torch.stack(units[1])).norm(dim=1) for u in units[0]])
    return [int(j) for j in linear_sum_assignment(cost.numpy())[1]]


def _in_order(t: Tensor, axis: NeuronAxis | None, order: list[int]) -> Tensor:
    if axis is None:
        return t
    rows = t if axis.dim == 0 else t.T
    new, count = torch.empty_like(rows), len(order)
    for i, j in enumerate(order):
        for b in range(axis.each):
            place = (lambda k: k + b * count) if axis.apart else (lambda k: k * axis.each + b)  # noqa: B023
            new[place(i)] = rows[place(j)]
    return new if axis.dim == 0 else new.T


@pytest.mark.parametrize("kind", KINDS)
def test_copies_with_other_orders_merge_into_what_they_are_copies_of(
    kind: str, tmp_path: Path
) -> None:
    source, _, plan = planned(kind, tmp_path)
    model = original(source)
    for i, (block, group) in enumerate(zip(find_blocks(model), plan.groups, strict=True)):
        for shares in group.merged.values():
            centre, *others = (int(m) for m in shares)
            for p in block.experts.parameters():
                parts = parts_of(p.detach(), block.num_experts)
                for m in others:
                    parts[m].copy_(parts[centre])
        wanted = shuffle(block, i)
        now = {n: [t.clone() for t in parts_of(p.detach(), block.num_experts)]
               for n, p in block.experts.named_parameters()}  # fmt: skip
        new = merged_tensors(block, shares_of(group), aligned=True)
        for name, parts in now.items():
            tensor = new[f"{block.name}.{block.path(block.experts, name)}"]
            for got, kept in zip(parts_of(tensor, len(group.kept)), group.kept, strict=True):
                torch.testing.assert_close(got, parts[kept], rtol=1e-6, atol=1e-7)
        plain = merged_tensors(block, shares_of(group))
        assert any(not torch.allclose(plain[n], new[n], rtol=1e-3) for n in new)
        assert wanted.keys() == now.keys()


def test_an_expert_that_no_token_reached_counts_as_the_least(tmp_path: Path) -> None:
    source, statistics, plan = planned("mixtral", tmp_path)
    group = next(g for g in plan.groups if g.merged)
    members = [int(m) for m in next(iter(group.merged.values()))]
    for sums in statistics.sums.values():
        for name in ("tokens", "gated_norm"):
            sums[name][:, members[-1]] = 0
    again = next(g for g in remade(source, statistics).groups if g.name == group.name)
    weights = {int(m): w for s in again.merged.values() for m, w in s.items()}
    assert 0 < weights[members[-1]] <= min(weights.values())


def test_a_plan_of_all_dead_experts_is_an_average(tmp_path: Path) -> None:
    source, statistics, _ = planned("mixtral", tmp_path)
    for sums in statistics.sums.values():
        for value in sums.values():
            value.zero_()
    for group in remade(source, statistics).groups:
        for shares in group.merged.values():
            assert list(shares.values()) == pytest.approx([1 / len(shares)] * len(shares))


def test_another_method_gives_the_centroids(tmp_path: Path) -> None:
    source, statistics, _ = planned("qwen2_moe", tmp_path)
    merged = remade(source, statistics, method="frequency", allocate="global")
    cut = pipeline.plan(
        statistics, Recipe(total=kept_in_all(source), method="frequency", allocate="global")
    )
    assert merged.kept == cut.kept
    assert not merged.uniform


def test_tensors_of_unknown_form_are_refused_before_anything_is_measured(tmp_path: Path) -> None:
    tiny_model("mixtral").save_pretrained(tmp_path / "model")
    source = Checkpoint(str(tmp_path / "model"))
    experts = source.blocks[0].experts
    experts.third = nn.Parameter(torch.zeros(source.blocks[0].num_experts, 3))
    with pytest.raises(ValueError, match=r"lie in third .* is not known.*--reduce merge"):
        check_mergeable(source, aligned=True)
    check_mergeable(source)
