"""A layer parted into its MoE block and the rest; training on the block alone is the layer's."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from tiny import tiny_model
from torch import Tensor

from moe_fair.engines.batch import Batch
from moe_fair.engines.layer_calls import LayerCall
from moe_fair.engines.loaded import LoadedLayers
from moe_fair.engines.streaming import StreamingEngine
from moe_fair.moe import layer_distillation
from moe_fair.moe.blocks import MoeBlock, find_blocks
from moe_fair.moe.judging import judges
from moe_fair.moe.layer_distillation import distill_layer
from moe_fair.moe.layer_examples import BlockExamples, Kinds, LayerExamples
from moe_fair.moe.layer_split import LayerSplit, split_of
from moe_fair.moe.repair import Repairer
from moe_fair.moe.routed_output import RoutedOutput, read_down


def batches(count: int = 3) -> list[Batch]:
    """Of five sequences each, of which the last judges; some are padded."""
    g = torch.Generator().manual_seed(3)
    made = []
    for number in range(count):
        ids = torch.randint(3, 128, (5, 12), generator=g)
        mask = torch.ones_like(ids)
        mask[1, 7:] = mask[4, 9:] = 0
        made.append(Batch(ids, mask, torch.arange(5) + 5 * number, 0))
    return made


def last_layer(kind: str, count: int = 3) -> tuple[Any, MoeBlock, list[LayerCall], list[Tensor]]:
    model = tiny_model(kind).eval().requires_grad_(False)
    engine = StreamingEngine(LoadedLayers(model))
    calls, hidden = engine.embed(batches(count))
    block = find_blocks(model)[-1]
    its = [row[block.layer] for row in calls]
    return engine.layered.decoder.layers[block.layer], block, its, hidden


# a tuple, a shared expert, groups and a bias of the choice
@pytest.mark.parametrize("kind", ["qwen2_moe", "gpt_oss", "deepseek_v3", "mixtral"])
def test_the_sum_is_the_layers_own_output(kind: str) -> None:
    layer, block, calls, hidden = last_layer(kind)
    split = split_of(layer, block.block, calls[0], hidden[0])
    assert split is not None
    with torch.no_grad():
        for call, h in zip(calls, hidden, strict=True):
            x, rest = split.parts(call, h)
            assert torch.equal(rest + split.run(x), call.run(layer, h))
            alone = split.run(x[:, 3:4])  # a token beside others is as it is by itself
            torch.testing.assert_close(alone, split.run(x)[:, 3:4], rtol=1e-4, atol=1e-6)
    assert "forward" not in vars(block.block)


def test_there_is_no_split_where_the_output_is_no_sum() -> None:
    layer, block, calls, hidden = last_layer("granitemoe")
    layer.residual_multiplier = 0.5  # a factor follows the block
    assert split_of(layer, block.block, calls[0], hidden[0]) is None
    layer, block, calls, hidden = last_layer("qwen2_moe")
    assert split_of(layer, layer, calls[0], hidden[0]) is None
    stock = type(block.block).forward

    def mixing(self: Any, hidden_states: Tensor) -> Tensor:
        return stock(self, hidden_states) + hidden_states.mean((0, 1))

    type(block.block).forward = mixing
    try:
        assert split_of(layer, block.block, calls[0], hidden[0]) is None
    finally:
        type(block.block).forward = stock


def examples(
    layer: Any, split: LayerSplit, calls: list[LayerCall], hidden: list[Tensor]
) -> tuple[LayerExamples, BlockExamples]:
    """The same by both ways: wanted is what the layer gives with other weights."""
    other, text = copy.deepcopy(layer), batches(len(calls))
    g = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for p in other.mlp.parameters():
            p += 0.1 * p.std() * torch.randn(p.shape, generator=g)
        targets = [c.run(other, h) for c, h in zip(calls, hidden, strict=True)]
        parts = [split.parts(c, h) for c, h in zip(calls, hidden, strict=True)]
        kinds = Kinds(text, judges, torch.device("cpu"))
        rows = enumerate(zip(targets, hidden, strict=True))
        learned, judged = sum(kinds.change(j, t, h) for j, (t, h) in rows).tolist()
    whole = LayerExamples(layer, calls, kinds, hidden, targets)
    given, rests = zip(*parts, strict=True)
    return whole, BlockExamples(split, kinds, given, rests, targets, (learned, judged))


def test_training_the_block_alone_is_training_in_the_layer() -> None:
    layer, block, calls, hidden = last_layer("qwen2_moe")
    split = split_of(layer, block.block, calls[0], hidden[0])
    assert split is not None
    whole, alone = examples(layer, split, calls, hidden)
    assert (whole.teaching, whole.judging) == (alone.teaching, alone.judging)
    assert alone.unit == pytest.approx(whole.unit, rel=1e-5)
    assert alone.size == pytest.approx(whole.size, rel=1e-5)
    before, results = copy.deepcopy(layer.state_dict()), []
    for which in (whole, alone):
        layer.load_state_dict(before)
        done = distill_layer(which, block, epochs=3, look=False)
        assert done.epoch
        assert done.after < 0.95 * done.before
        results.append((done, copy.deepcopy(block.block.state_dict())))
    (a, its), (b, others) = results
    assert (a.before, a.after) == (
        pytest.approx(b.before, rel=1e-4),
        pytest.approx(b.after, rel=1e-2),
    )
    for n, p in its.items():
        assert float((p - others[n]).norm()) < 1e-2 * float(p.norm()), n


def test_training_ends_where_nothing_is_gained(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is wanted is noise: whatever is learned from it makes what judges worse."""
    layer, block, calls, hidden = last_layer("qwen2_moe")
    steps = []
    stock = layer_distillation._Training.step
    monkeypatch.setattr(
        layer_distillation._Training, "step", lambda s, j: (steps.append(j), stock(s, j))
    )
    text = batches()
    g = torch.Generator().manual_seed(5)
    with torch.no_grad():
        targets = [c.run(layer, h) for c, h in zip(calls, hidden, strict=True)]
    targets = [t + 0.01 * torch.randn(t.shape, generator=g) for t in targets]
    kinds = Kinds(text * 4, judges, torch.device("cpu"))
    noise = LayerExamples(layer, calls * 4, kinds, hidden * 4, targets * 4)
    before = copy.deepcopy(layer.state_dict())
    done = distill_layer(noise, block, epochs=4)
    assert (done.epoch, done.after) == (0, done.before)
    assert len(steps) == 2 * 2  # of 12 an epoch, with the whole step and with a quarter
    assert all(torch.equal(p, before[n]) for n, p in layer.state_dict().items())
    assert distill_layer(noise, block, epochs=1, look=False).epoch == 0
    assert len(steps) == 4 + 12


@pytest.mark.parametrize("keep", [True, False])
def test_halves_of_the_tokens_are_the_routed_output_of_each(keep: bool) -> None:
    block = find_blocks(tiny_model("gpt_oss").double())[0]
    g = torch.Generator().manual_seed(1)
    x = torch.randn(30, block.experts.down_proj.shape[2], generator=g, dtype=torch.float64)
    ids = torch.stack([torch.randperm(block.num_experts, generator=g)[:2] for _ in x])
    weights = torch.rand(30, 2, generator=g, dtype=torch.float64)
    make = lambda rows: RoutedOutput(block.experts, x[rows], ids[rows], weights[rows], keep=keep)  # noqa: E731
    both, at = make(slice(None)), 17
    halves = both.split(at)
    w, r = read_down(block.experts), torch.randn(x.shape, generator=g, dtype=torch.float64)
    for half, rows in zip(halves, (slice(None, at), slice(at, None)), strict=True):
        alone = make(rows)
        torch.testing.assert_close(half.output(w), alone.output(w))
        torch.testing.assert_close(half.adjoint(r[rows]), alone.adjoint(r[rows]))
        torch.testing.assert_close(half.squares(), alone.squares())
    whole = make(slice(None))
    torch.testing.assert_close(both.gram, whole.gram)
    torch.testing.assert_close(both.squares(), whole.squares())
    for a, b in zip(both.own_grams(), whole.own_grams(), strict=True):
        torch.testing.assert_close(a, b)
    torch.testing.assert_close(both.output(w), whole.output(w))


@pytest.mark.slow
def test_experts_are_trained_in_parts() -> None:
    """Each part changes its own rows and nothing else; the first also what is no expert's."""
    layer, block, calls, hidden = last_layer("qwen2_moe", 4)
    split = split_of(layer, block.block, calls[0], hidden[0])
    assert split is not None
    _, alone = examples(layer, split, calls, hidden)
    # what is learned, not whether it holds
    alone.judging, alone.kinds.rows[True] = alone.teaching, alone.kinds.rows[False]
    errors = []
    for part in range(3):
        before = copy.deepcopy(block.block.state_dict())
        done = distill_layer(alone, block, epochs=9, look=False, part=(part, 3))
        assert done.epoch == 3
        errors += [done.before, done.after]
        size = block.num_experts
        own = set(range(size * part // 3, size * (part + 1) // 3))
        for n, p in block.block.state_dict().items():
            if n.startswith("experts."):
                assert {e for e in range(size) if not torch.equal(p[e], before[n][e])} == own, n
            else:
                assert torch.equal(p, before[n]) == bool(part), n
    assert errors == sorted(errors, reverse=True)
    assert errors[2] == pytest.approx(errors[1], rel=1e-5)  # each goes on from the last


@pytest.mark.slow
def test_where_training_does_not_fit_the_fit_stands(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_model("qwen2_moe").eval()
    kept = {b.name: list(range(0, b.num_experts, 2)) for b in find_blocks(model)[:1]}
    fitted, trained, said = copy.deepcopy(model), copy.deepcopy(model), list[str]()
    walk = lambda m, kind, **more: Repairer(  # noqa: E731
        StreamingEngine(LoadedLayers(m)), kept, kind, **more
    ).run(batches(2))
    stock, fits = layer_distillation._Training.__init__, 4

    def lack(self: Any, e: Any, b: Any, epochs: int, share: float, part: tuple[int, int]) -> None:
        if part[1] < fits:
            raise MemoryError("no room\nand more")
        stock(self, e, b, epochs, share, part)

    monkeypatch.setattr(layer_distillation._Training, "__init__", lack)
    with pytest.raises(MemoryError):  # first what is not in use goes to main memory
        walk(trained, "distill")
    done = walk(copy.deepcopy(model), "distill", sparing=True, say=said.append)
    name = done[0].name
    assert said[:2] == [
        f"{name}: out of memory (no room): its experts are trained in {n} parts" for n in (2, 4)
    ]
    assert len(said) == 2 * len(done)
    fits = 1000
    said.clear()
    trained = copy.deepcopy(model)
    done = walk(trained, "distill", sparing=True, say=said.append)
    assert f"{name}: out of memory (no room): fitted, and trained no further" in said
    assert [d.epoch for d in done] == [0] * len(done)
    walk(fitted, "refit")
    for a, b in zip(trained.parameters(), fitted.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)
