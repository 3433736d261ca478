"""What is collected, against naive loops, autograd on the weights, and finite differences."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from collected import FORWARD, TAYLOR, VECTORS, families
from tiny import tiny_model
from torch import Tensor
from torch.nn import functional as F

from moe_fair.core.units import Statistics
from moe_fair.engines.batch import Batch
from moe_fair.engines.resident import ResidentEngine
from moe_fair.moe.blocks import find_blocks
from moe_fair.moe.collector import ExpertCollector
from moe_fair.moe.criteria import criteria
from moe_fair.moe.criteria.counterfactual import agreement
from moe_fair.moe.statistics import collecting

DOMAINS = ("a", "b")


def batches(pad: int = 0) -> list[Batch]:
    """Three unequal batches of two domains; two have padding, filled with token `pad`."""
    g = torch.Generator().manual_seed(5)
    made = []
    for number, (b, length, domain) in enumerate([(3, 20, 0), (2, 11, 1), (1, 20, 1)]):
        ids = torch.randint(3, 128, (b, length), generator=g)
        mask = torch.ones_like(ids)
        if number < 2:
            mask[1, length - 6 :] = 0
        ids = torch.where(mask.bool(), ids, torch.full_like(ids, pad))
        made.append(Batch(ids, mask, torch.arange(b) + 10 * number, domain))
    return made


def collect(
    model: Any, data: list[Batch], taylor: bool = True, counterfactual: bool = False
) -> Statistics:
    blocks = find_blocks(model)
    more = ["counterfactual"] if counterfactual else []
    wanted = families(*more, taylor=taylor)
    collector = ExpertCollector(blocks, [b.unit_group(4) for b in blocks], DOMAINS, wanted)
    with collector:
        ResidentEngine(model).run(data, collector, backward=taylor)
    return collector.statistics()


def model_of(kind: str = "qwen2_moe", implementation: str = "grouped_mm", **extra: Any) -> Any:
    model = tiny_model(kind, **extra)
    model.set_experts_implementation(implementation)
    return model


def loss_of(model: Any, batch: Batch) -> Tensor:
    """Σ over sequences of the mean next-token loss, written anew."""
    logits = model(batch.input_ids, attention_mask=batch.mask).logits
    total = logits.new_zeros(())
    for row, ids, mask in zip(logits, batch.input_ids, batch.mask, strict=True):
        n = int(mask.sum())
        total = total + F.cross_entropy(row[: n - 1], ids[1:n])
    return total


@contextmanager
def recorded(model: Any) -> Iterator[list[tuple[Any, Tensor, Tensor, Tensor, Tensor]]]:
    """(experts module, input, ids, weights, output) of every call, seen from outside."""
    calls: list[tuple[Any, Tensor, Tensor, Tensor, Tensor]] = []
    handles = [
        b.experts.register_forward_hook(lambda m, args, out: calls.append((m, *args, out)))
        for b in find_blocks(model)
    ]
    yield calls
    for h in handles:
        h.remove()


def expert(m: Any, e: int, x: Tensor) -> Tensor:
    """f_e(x) of a gated expert."""
    gate, up = (x @ m.gate_up_proj[e].T).chunk(2, -1)
    return (m.act_fn(gate) * up) @ m.down_proj[e].T


def naive(model: Any, data: list[Batch]) -> dict[str, dict[str, Tensor]]:
    """Every forward statistic by a loop over layers, experts and tokens."""
    blocks = find_blocks(model)
    sums: dict[str, dict[str, Tensor]] = {b.name: {} for b in blocks}
    for batch in data:
        with recorded(model) as calls, torch.no_grad():
            model(batch.input_ids, attention_mask=batch.mask)
        for block, (m, x, ids, weights, out) in zip(blocks, calls, strict=True):
            for t in range(len(x)):
                if batch.mask.flatten()[t] == 0:
                    continue
                xd, yd = x[t].double(), out[t].double()
                turn = 1 - xd @ (xd + yd) / (xd.norm() * (xd + yd).norm())
                for e, g in zip(ids[t].tolist(), weights[t].double(), strict=True):
                    f = expert(m, e, x[t]).double()
                    n = f.norm()
                    values = {
                        "tokens": torch.tensor(1.0), "gate": g, "gate_sq": g**2, "norm": n,
                        "norm_sq": n**2, "gated_norm": g * n, "gated_norm_sq": (g * n) ** 2,
                        "turned_norm": g * n * turn, "output": f, "output_sq": f**2,
                    }  # fmt: skip
                    for name, v in values.items():
                        shape = (len(DOMAINS), block.num_experts, *v.shape)
                        zeros = torch.zeros(shape, dtype=torch.float64)
                        sums[block.name].setdefault(name, zeros)[batch.domain, e] += v
    return sums


@pytest.mark.parametrize("implementation", ["grouped_mm", "eager"])
@pytest.mark.parametrize("norm_topk_prob", [False, True])
def test_forward_statistics_equal_a_naive_loop(implementation: str, norm_topk_prob: bool) -> None:
    model = model_of(implementation=implementation, norm_topk_prob=norm_topk_prob)
    got, want = collect(model, batches()), naive(model, batches())
    for group in got.groups:
        for name in (*FORWARD, *VECTORS):
            a, b = got.sums[group.name][name], want[group.name][name]
            scale = b.abs().max() if name in VECTORS else b.abs().clamp(min=1e-30)
            # eager experts sum a token's outputs in another order: last float32 bits differ, and
            # 1 - cos(x, x + y) magnifies that
            limit = 3e-6 if implementation == "eager" else 1e-6
            assert ((a - b).abs() / scale).max() < limit, (group.name, name)


def test_constants_are_of_each_experts_matrices() -> None:
    model = model_of()
    got = collect(model, batches(), taylor=False)
    for block in find_blocks(model):
        found = got.constants[block.name]
        for e in range(block.num_experts):
            w = torch.cat([p[e].flatten() for p in block.experts.parameters()]).double()
            assert found["weight_abs"][e] == pytest.approx(float(w.abs().sum()), rel=1e-6)
            assert found["weight_sq"][e] == pytest.approx(float(w.square().sum()), rel=1e-6)
            assert found["weight_count"][e] == len(w)


def test_padding_is_never_counted() -> None:
    model = model_of()
    a, b = collect(model, batches(pad=0)), collect(model, batches(pad=77))
    assert a.tokens.tolist() == [54.0, 36.0]
    assert a.sums["model.layers.0.mlp"]["tokens"].sum() == 90 * 4
    for group in a.groups:
        for name, value in a.sums[group.name].items():
            error = (value - b.sums[group.name][name]).abs().max()
            assert error < 1e-5 * value.abs().max(), name


def test_watching_changes_no_logit_and_leaves_no_trace() -> None:
    model = model_of()
    batch = batches()[0]
    blocks = find_blocks(model)
    groups = [b.unit_group(4) for b in blocks]
    collector = ExpertCollector(blocks, groups, DOMAINS, families(taylor=False))

    def watched() -> None:
        with collector:
            collector.begin(batch)
            seen.append(model(batch.input_ids, attention_mask=batch.mask).logits)
            raise RuntimeError("stop")

    seen: list[Tensor] = []
    with torch.no_grad():
        before = model(batch.input_ids, attention_mask=batch.mask).logits
        with pytest.raises(RuntimeError, match="stop"):
            watched()
    assert torch.equal(before, seen[0])
    assert all("forward" not in b.experts.__dict__ for b in blocks)


def test_taylor_sums_equal_weight_times_gradient() -> None:
    """Σ_t t_e = Σ_{w in down_proj_e} w · dL/dw, as docs/methods.md, section 6, says."""
    model = model_of()
    got = collect(model, batches())
    blocks = find_blocks(model)
    for domain in range(2):
        for b in blocks:
            b.experts.down_proj.requires_grad_(True).grad = None
        for batch in batches():
            if batch.domain == domain:
                loss_of(model, batch).backward()
        for b in blocks:
            want = (b.experts.down_proj * b.experts.down_proj.grad).double().sum((1, 2)).detach()
            have = got.sums[b.name]["taylor"][domain]
            assert (have - want).abs().max() < 1e-5 * want.abs().max()


def test_rows_are_each_sequence_alone() -> None:
    model = model_of()
    got = collect(model, batches())
    assert got.sequence_ids.tolist() == [0, 1, 2, 10, 11, 20]
    batch = batches()[1]
    n = int(batch.mask[1].sum())
    alone = Batch(batch.input_ids[1:, :n], batch.mask[1:, :n], torch.tensor([11]), 1)
    single = collect(model, [alone])
    for group in got.groups:
        row = got.rows[group.name][4]
        assert (row - single.rows[group.name][0]).abs().max() < 1e-5 * row.abs().max()
        total = got.rows[group.name].sum(0)
        torch.testing.assert_close(
            total, got.sums[group.name]["taylor"].sum(0), rtol=1e-9, atol=1e-12
        )


@contextmanager
def scaled(block: Any, e: int, factor: float) -> Iterator[None]:
    """The block's routed output with expert e's share multiplied: an independent gate."""
    stock = block.experts.forward

    def forward(x: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
        return stock(x, ids, torch.where(ids == e, weights * factor, weights))

    block.experts.forward = forward
    yield
    del block.experts.forward


def all_in_float64(model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Norms and the router's softmax of the family compute in float32: replace just those."""
    stock = F.softmax

    def softmax(x: Tensor, dim: int = -1, dtype: Any = None, **_: Any) -> Tensor:
        return stock(x, dim=dim)

    monkeypatch.setattr(torch.nn.functional, "softmax", softmax)
    for m in model.modules():
        if type(m).__name__.endswith("RMSNorm"):
            m.forward = lambda x, m=m: (
                m.weight * x * (x.square().mean(-1, keepdim=True) + m.variance_epsilon).rsqrt()
            )


def test_gate_taylor_equals_central_differences_in_float64(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model = model_of(implementation="eager", num_hidden_layers=2).double()
    all_in_float64(model, monkeypatch)
    data = batches()[:1]
    got = collect(model, data)
    step = 1e-5
    for block in find_blocks(model):
        have = got.sums[block.name]["taylor"].sum(0)
        for e in range(0, block.num_experts, 3):
            losses = []
            for factor in (1 + step, 1 - step):
                with scaled(block, e, factor), torch.no_grad():
                    losses.append(float(loss_of(model, data[0])))
            want = (losses[0] - losses[1]) / (2 * step)
            assert abs(float(have[e]) - want) < 1e-6 * max(abs(want), float(have.abs().max()))


def test_per_token_aggregations() -> None:
    """Σ|t| and Σt² from the gradient at the layer's output, token by token."""
    model = model_of(num_hidden_layers=2)
    batch = batches()[1]
    got = collect(model, [batch])
    model.get_input_embeddings().weight.requires_grad_(True)
    with recorded(model) as calls:
        outputs = []
        loss = loss_of(model, batch)
        outputs = [c[4] for c in calls]
    gradients = torch.autograd.grad(loss, outputs)
    for block, (m, x, ids, weights, _), dy in zip(
        find_blocks(model), calls, gradients, strict=True
    ):
        want = torch.zeros(2, block.num_experts, dtype=torch.float64)
        for t in range(len(x)):
            for e, g in zip(ids[t].tolist(), weights[t], strict=True):
                value = float(dy[t] @ (g * expert(m, e, x[t])).detach()) * float(
                    batch.mask.flatten()[t]
                )
                want[:, e] += torch.tensor([abs(value), value**2], dtype=torch.float64)
        for name, row in zip(TAYLOR[1:], want, strict=True):
            have = got.sums[block.name][name][1]
            assert (have - row).abs().max() < 1e-5 * row.abs().max()


def test_forward_only_is_the_same_without_taylor() -> None:
    model = model_of()
    with_taylor, without = collect(model, batches()), collect(model, batches(), taylor=False)
    assert without.rows == {}
    for group in with_taylor.groups:
        assert set(without.sums[group.name]) == {*FORWARD, *VECTORS}
        for name, value in without.sums[group.name].items():
            assert torch.equal(value, with_taylor.sums[group.name][name])
    with pytest.raises(ValueError, match="needs rows"):
        criteria()["taylor-sq"](without)


def test_shards_merge_to_the_whole() -> None:
    model, data = model_of(), batches()
    whole, parts = collect(model, data), collect(model, data[1:]).merge(collect(model, data[:1]))
    assert torch.equal(whole.sequence_ids, parts.sequence_ids)
    for group in whole.groups:
        assert torch.equal(whole.rows[group.name], parts.rows[group.name])
        for name, value in whole.sums[group.name].items():
            torch.testing.assert_close(value, parts.sums[group.name][name], rtol=1e-12, atol=1e-15)


def test_checkpointed_layers_are_booked_once() -> None:
    model = model_of()
    want = collect(model, batches())
    model.activation_checkpointing_enable({"use_reentrant": False})
    model.enable_input_require_grads()
    blocks = find_blocks(model)
    collector = ExpertCollector(blocks, [b.unit_group(4) for b in blocks], DOMAINS, families())
    engine = ResidentEngine(model)
    model.train()  # transformers checkpoints in training mode only; this model has no dropout
    with collector:
        engine.run(batches(), collector)
    got = collector.statistics()
    for group in want.groups:
        for name, value in want.sums[group.name].items():
            torch.testing.assert_close(got.sums[group.name][name], value, rtol=1e-6, atol=1e-9)


def naive_set_score(c: Tensor, first: list[float]) -> Tensor:
    """Greedy removal with the objective computed anew for every candidate set."""

    def cost(s: list[int]) -> float:
        return sum(first[e] for e in s) + 0.5 * sum(max(float(c[e, f]), 0.0) for e in s for f in s)

    removed: list[int] = []
    score = torch.zeros(len(c), dtype=torch.float64)
    while len(removed) < len(c):
        rest = [e for e in range(len(c)) if e not in removed]
        best = min(rest, key=lambda e: cost([*removed, e]))
        score[best] = cost([*removed, best]) - cost(removed)
        removed.append(best)
    assert sorted(removed) == list(range(len(c)))
    return score


def naive_agreed(s: Statistics, name: str) -> list[float]:
    """Σ_t δ_e / T, times 1 - 2 s²/m² where that is positive."""
    sums, shrunk = s.sums[name], []
    tokens, sequences = s.tokens.tolist(), int(s.sequences.sum())
    for e in range(s.rows[name].shape[1]):
        first = sums["removed_first"][:, e].tolist()
        squares = float(sums["removed_first_sq"][:, e].sum())
        m = sum(first) / sequences
        error = [(squares - sequences * m**2) / sequences / (sequences - 1) / m**2]
        mean = sum(first) / sum(tokens)
        share = [t / sum(tokens) for t in tokens]
        spread = sum(p * (f / t - mean) ** 2 for p, f, t in zip(share, first, tokens, strict=True))
        error.append(spread / (1 / sum(p**2 for p in share) - 1) / mean**2)
        shrunk.append(mean * max(0.0, 1 - 2 * max(error)))
    return shrunk


def test_text_of_one_domain_or_one_sequence_agrees_with_itself_as_far_as_it_can_tell() -> None:
    """Between sequences where there is one domain; not at all where there is one sequence."""
    model = model_of()
    every = batches()
    one = [b for b in every if b.domain == 0]
    for text, known in ((one, True), (one[0].parts(1)[:1], False)):
        s = collect(model, text, counterfactual=True)
        for group in s.groups:
            view = s.view(group)
            share = agreement(view)
            assert share.isfinite().all()
            assert bool((share > 0).any()) is known
            n, first = view.total_sequences, view["removed_first"]
            if known:
                variance = (view["removed_first_sq"] - first**2 / n) / (n - 1)
                wanted = (1 - 2 * variance / n / (first / n) ** 2).clamp(min=0)
                torch.testing.assert_close(share, wanted, rtol=1e-9, atol=1e-12)


def test_a_domain_without_weight_does_not_disagree() -> None:
    """And twice the weight for all is none for any."""
    model = model_of()
    s = collect(model, batches(), counterfactual=True)
    for group in s.groups:
        plain, small = (agreement(s.view(group, {"a": w, "b": w})) for w in (1.0, 0.01))
        torch.testing.assert_close(plain, small, rtol=1e-9, atol=1e-12)
    only = collect(model, [b for b in batches() if b.domain == 0], counterfactual=True)
    for group in s.groups:
        left = s.view(group, {"b": 0.0})
        # the sequences of the other domain are gone from the sums as well
        torch.testing.assert_close(agreement(left), agreement(only.view(group)))


def test_criteria_are_their_formulas() -> None:
    model = model_of()
    s = collect(model, batches(), counterfactual=True)
    block = find_blocks(model)[1]
    total = {k: v.sum(0) for k, v in s.sums[block.name].items()}
    n, rows = total["tokens"].clamp(min=1), s.rows[block.name]
    variance = (total["output_sq"] / n[:, None] - (total["output"] / n[:, None]) ** 2).sum(1)
    matrices = [
        torch.cat([p[e].flatten() for p in block.experts.parameters()]).double()
        for e in range(block.num_experts)
    ]
    want = {
        "frequency": total["tokens"], "router-mass": total["gate"], "ean": total["norm"],
        "routed-mass": total["gated_norm"], "reap": total["gated_norm"] / n,
        "man": total["norm"] / n, "msan": total["norm_sq"] / n, "easy-ep": total["turned_norm"],
        "mone": 0.5 * variance.clamp(min=0).sqrt() * 0.5 * total["gate"] / 90,
        "aimer": torch.stack([-w.abs().mean() / w.square().mean().sqrt() for w in matrices]),
        "taylor": (rows.sum(0) / 6).abs(), "taylor-abs": total["taylor_abs"] / 90,
        "taylor-sq": (rows**2).mean(0),
        "reconstruction": total["removed_error"] / 90,
        "counterfactual-first": total["removed_first"] / 90,
        "counterfactual": total["removed_first"] / 90 + total["removed_gram"].diagonal() / 180,
        "counterfactual-fisher": total["removed_gram"].diagonal() / 180,
    }  # fmt: skip
    shrunk = naive_agreed(s, block.name)
    assert 0 in shrunk
    assert any(shrunk)
    want["counterfactual-set"] = naive_set_score(total["removed_gram"] / 90, [0.0] * len(shrunk))
    want["counterfactual-agreed"] = naive_set_score(total["removed_gram"] / 90, shrunk)
    for name, value in want.items():
        have = criteria()[name](s).values[block.name]
        torch.testing.assert_close(have, value.double(), rtol=1e-6, atol=1e-12, msg=name)
    noise = criteria()["random"](s).values[block.name]
    assert torch.equal(noise, criteria()["random"](s).values[block.name])
    assert len(noise.unique()) == len(noise)


def test_consensus_is_the_mean_place_in_the_whole_model() -> None:
    """By places counted one by one; equal scores share their places."""
    s = collect(model_of(), batches(), counterfactual=True)
    names = ("routed-mass", "mone", "reconstruction", "taylor-sq", "counterfactual-agreed", "reap")
    places: dict[tuple[str, int], list[float]] = {}
    for name in names:
        scores = {
            (g, e): float(x)
            for g, values in criteria()[name](s).values.items()
            for e, x in enumerate(values)
        }
        for unit, x in scores.items():
            below = sum(y < x for y in scores.values())
            equal = sum(y == x for y in scores.values())
            places.setdefault(unit, []).append((below + (equal - 1) / 2) / (len(scores) - 1))
    found = criteria()["consensus"](s)
    assert found.criterion == "consensus"
    assert len(found.values) == len(s.groups) > 1
    for (group, e), its in places.items():
        assert float(found.values[group][e]) == pytest.approx(sum(its) / 6, rel=1e-7)


def test_an_expert_without_tokens_scores_lowest_and_finite() -> None:
    model = model_of()
    block = find_blocks(model)[0]
    with torch.no_grad():
        block.router.weight[5] = 0
        block.router.weight[:5] = block.router.weight[:5].abs() * 0
    s = collect(model, batches())
    unused = (s.sums[block.name]["tokens"].sum(0) == 0).nonzero().flatten()
    assert len(unused) > 0
    for name in ("reap", "man", "msan", "mone", "frequency", "routed-mass"):
        assert (criteria()[name](s).values[block.name][unused] == 0).all()


def test_a_statistic_that_no_family_has_is_refused() -> None:
    with pytest.raises(ValueError, match="no family of statistics has 'gated_nrom'"):
        collecting(["tokens", "gated_nrom"])
