"""Repairs: each fit against its closed form, the walk in both engines, the checkpoint left."""

from __future__ import annotations

import copy
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from flow import some
from places import CALIBRATION, MODEL
from safetensors import safe_open
from tiny import tiny_model
from torch import Tensor

from moe_fair.engines.auto import auto_class
from moe_fair.engines.batch import Batch
from moe_fair.engines.layers import LayeredModel
from moe_fair.engines.loaded import LoadedLayers
from moe_fair.engines.streaming import StreamingEngine
from moe_fair.moe.block_recorder import BlockRecorder
from moe_fair.moe.blocks import MoeBlock, find_blocks
from moe_fair.moe.calibration_text import sample
from moe_fair.moe.checkpoint_source import Checkpoint
from moe_fair.moe.checkpoint_writer import write_model
from moe_fair.moe.layer_fit import error, fit_layer
from moe_fair.moe.layer_repair import LayerRepair
from moe_fair.moe.repair import Repairer
from moe_fair.moe.repairs import refit, repair, repairs
from moe_fair.moe.routed_output import RoutedOutput, read_down, write_down
from moe_fair.moe.surgery import cut
from moe_fair.moe.text_sources import expand, parse_source

pytestmark = pytest.mark.slow  # whole runs, by and large

# per-expert matrices with a shared expert; fused, transposed and with biases; groups and a bias of
# the choice; a multiplier on the residual branch
KINDS = ["qwen2_moe", "gpt_oss", "deepseek_v3", "granitemoe"]


def batches() -> list[Batch]:
    """Twelve sequences of two domains; two of them are padded."""
    g = torch.Generator().manual_seed(3)
    made = []
    for number in range(3):
        ids = torch.randint(3, 128, (4, 20), generator=g)
        mask = torch.ones_like(ids)
        if number == 1:
            mask[1, 15:] = mask[3, 9:] = 0
        made.append(Batch(ids, mask, torch.arange(4) + 4 * number, number % 2))
    return made


def saved(kind: str, folder: Path) -> Checkpoint:
    tiny_model(kind).save_pretrained(folder)
    return Checkpoint(str(folder))


def load(path: Path, dtype: torch.dtype = torch.float32) -> Any:
    checkpoint = Checkpoint(str(path))
    auto = auto_class(checkpoint.config)
    return auto.from_pretrained(path, dtype=dtype, trust_remote_code=False).eval()


def plan(checkpoint: Checkpoint) -> dict[str, list[int]]:
    return {b.name: some(b, i, uniform=True) for i, b in enumerate(checkpoint.blocks)}


def walk(
    model: Any,
    kept: dict[str, list[int]],
    kind: str,
    folder: Path | None = None,
    text: list[Batch] | None = None,
) -> list[LayerRepair]:
    engine = StreamingEngine(LoadedLayers(model))
    if folder is not None:
        folder.mkdir(exist_ok=True)
    return Repairer(engine, kept, kind, folder=folder, key="k").run(text or batches())


def one_layer(kind: str) -> tuple[MoeBlock, BlockRecorder]:
    """A block in float64 and what passes through its experts."""
    model = tiny_model(kind).double().eval().requires_grad_(False)
    model.set_experts_implementation("eager")
    block = find_blocks(model)[-1]
    watch = BlockRecorder(block)
    ids = torch.randint(3, 128, (6, 60), generator=torch.Generator().manual_seed(1))
    # norms and routers of some families compute in float32: only what follows must be float64
    with watch, torch.no_grad():
        model(input_ids=ids, use_cache=False)
    return block, watch


def design(block: MoeBlock, watch: BlockRecorder) -> Tensor:
    """[T, E·F] by a loop over tokens and slots: g·h of each routed expert in its own columns."""
    m, x = block.experts, watch.x
    width = read_down(m).shape[1]
    rows = torch.zeros(len(x), block.num_experts, width, dtype=torch.float64)
    for t in range(len(x)):
        for e, g in zip(watch.index[t].tolist(), watch.weights[t], strict=True):
            if m.is_transposed:
                gate_up = x[t] @ m.gate_up_proj[e] + m.gate_up_proj_bias[e]
                gate, up = gate_up[::2].clamp(max=m.limit), gate_up[1::2].clamp(-m.limit, m.limit)
                h = (up + 1) * gate * torch.sigmoid(gate * m.alpha)
                h = torch.cat([h, torch.ones(1, dtype=h.dtype)])
            else:
                gate, up = (m.gate_up_proj[e] @ x[t]).chunk(2)
                h = m.act_fn(gate) * up
            rows[t, e] = g * h
    return rows.flatten(1)


@pytest.mark.parametrize("kind", ["qwen2_moe", pytest.param("gpt_oss", marks=pytest.mark.nightly)])
def test_fits_equal_their_closed_forms(kind: str) -> None:
    block, watch = one_layer(kind)
    routed = RoutedOutput(block.experts, watch.x, watch.index, watch.weights)
    phi, w0 = design(block, watch), read_down(block.experts)
    flat = w0.flatten(0, 1)
    y = phi @ flat
    torch.testing.assert_close(y, watch.y, rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(routed.output(w0), y, rtol=1e-9, atol=1e-12)
    noise = torch.randn(y.shape, dtype=y.dtype, generator=torch.Generator().manual_seed(0))
    target = 0.8 * y.roll(1, 1) + 0.7 * y + 0.1 * y.std() * noise
    torch.testing.assert_close(routed.adjoint(target).flatten(0, 1), phi.T @ target)

    a = (target * y).sum() / (y * y).sum()
    got = repair("scale").fit(routed, target, 0.0)
    torch.testing.assert_close(got, a * w0, rtol=1e-9, atol=1e-12)

    lam = 0.1 * (y * y).sum(0).mean()
    each = ((y * target).sum(0) + lam * a) / ((y * y).sum(0) + lam)
    got = repair("channel").fit(routed, target, 0.1)
    torch.testing.assert_close(got, w0 * each, rtol=1e-9, atol=1e-12)

    if block.experts.has_bias:
        missing = target - y
        constant = torch.linalg.lstsq(watch.weights.sum(1, keepdim=True), missing).solution
        got = routed.output(repair("novice").fit(routed, target, 0.0))
        torch.testing.assert_close(got, y + watch.weights.sum(1, keepdim=True) * constant)
        # gpt_oss renormalises over the top k: the mean of the output is the target's
        torch.testing.assert_close(got.mean(0), target.mean(0))

    got = routed.output(repair("variance").fit(routed, target, 0.0))
    torch.testing.assert_close(got.std(0), target.std(0), rtol=1e-9, atol=1e-12)

    eye = torch.eye(y.shape[1], dtype=y.dtype)
    lam = 0.3 * (y.T @ y).diagonal().mean()
    stacked = torch.cat([y, lam.sqrt() * eye]), torch.cat([target, lam.sqrt() * a * eye])
    matrix = torch.linalg.lstsq(*stacked).solution
    got = repair("matrix").fit(routed, target, 0.3)
    torch.testing.assert_close(got, w0 @ matrix, rtol=1e-7, atol=1e-10)

    lam = 0.3 * (phi * phi).sum(0).mean()
    eye = torch.eye(phi.shape[1], dtype=y.dtype)
    stacked = torch.cat([phi, lam.sqrt() * eye]), torch.cat([target, lam.sqrt() * a * flat])
    best = torch.linalg.lstsq(*stacked).solution
    torch.testing.assert_close(routed.gram, phi.T @ phi)
    for direct in (10**6, 0):  # the matrix, and Gauss-Seidel, from a stronger ridge or from afar
        for start in (None, torch.randn(w0.shape, dtype=w0.dtype)):
            fits = list(
                refit.path(
                    routed, target, [0.3, 3.0], start, direct=direct, sweeps=2000, solved=1e-13
                )
            )
            assert [r for r, _ in fits] == [3.0, 0.3]
            torch.testing.assert_close(fits[-1][1].flatten(0, 1), best, rtol=1e-7, atol=1e-9)
    # what a run does, two sweeps, is most of the way there
    error = lambda w: float((target - phi @ w).square().sum())  # noqa: E731
    [(_, short)] = refit.path(routed, target, [0.3], direct=0)
    short = short.flatten(0, 1)
    assert error(short) - error(best) < 0.05 * (error(a * flat) - error(best))


def test_domains_that_are_left_out_choose_the_ridge() -> None:
    """Against fits one by one; what is held out of the same domains would choose another."""
    block, watch = one_layer("qwen2_moe")
    with torch.no_grad():
        phi, w0 = design(block, watch), read_down(block.experts)
        draw = torch.Generator().manual_seed(4)
        moved = w0.flatten(0, 1) + w0.std() * torch.randn(
            phi.shape[1], w0.shape[2], generator=draw, dtype=phi.dtype
        )
        others, learn = 200, 280
        target = phi @ moved
        left = slice(others, learn)
        target[left] = 0.5 * watch.y[left] + 0.5 * target[left]
        target += 0.1 * target.std() * torch.randn(target.shape, generator=draw, dtype=phi.dtype)
        given = (watch.x, watch.index, watch.weights)

        def fitted(teach: slice, ridge: float) -> Tensor:
            routed = RoutedOutput(block.experts, *(t[teach] for t in given))
            return refit.fit(routed, target[teach], ridge)

        def wrong(w: Tensor, at: slice) -> float:
            return error(phi[at] @ w.flatten(0, 1), target[at])

        by_left = min(refit.ridges, key=lambda r: wrong(fitted(slice(others), r), left))
        held = slice(learn, None)
        by_held = min(refit.ridges, key=lambda r: wrong(fitted(slice(learn), r), held))
        want = wrong(fitted(slice(learn), by_left), held)
        stock = read_down(block.experts)
        for counts, ridge in (((others, learn), by_left), ((learn, learn), by_held)):
            write_down(block.experts, stock)
            done, _ = fit_layer(block, repair("refit"), *given, target, counts)
            assert (done.repair, done.ridge) == ("refit", ridge)
            if ridge == by_left:
                assert done.after == pytest.approx(want, rel=1e-6)
                assert wrong(read_down(block.experts), held) == pytest.approx(want, rel=1e-6)
    assert by_left > by_held


def test_a_fit_that_helps_no_domain_but_those_it_was_taught_by_is_not_taken() -> None:
    block, watch = one_layer("qwen2_moe")
    with torch.no_grad():
        others, learn = 200, 280
        target = 3 * watch.y
        target[others:learn] = watch.y[others:learn]
        given = (watch.x, watch.index, watch.weights)
        before = read_down(block.experts)
        done, on_all = fit_layer(block, repair("scale"), *given, target, (others, learn))
        assert (done.repair, on_all) == ("none", None)
        assert torch.equal(read_down(block.experts), before)
        done, _ = fit_layer(block, repair("scale"), *given, target, (learn, learn))
        assert done.repair == "scale"


def test_each_layer_leaves_other_domains_out() -> None:
    model = tiny_model("qwen2_moe").eval()
    blocks = find_blocks(model)
    kept = {b.name: list(range(4)) for b in blocks}
    repairer = Repairer(StreamingEngine(LoadedLayers(model)), kept, "refit")
    even = [b for d in (0, 1, 2) for b in [replace(batches()[0], domain=d)]]
    found = [repairer._left_out(b, even) for b in blocks]
    assert found == [{i % 3} for i in range(len(blocks))]
    assert len(found) > 1
    assert repairer._left_out(blocks[0], even[:1]) == set()


def test_weights_go_back_where_they_came_from() -> None:
    for kind in ("qwen2_moe", "gpt_oss"):
        block, watch = one_layer(kind)
        write_down(block.experts, 2 * read_down(block.experts))
        y = block.experts(watch.x, watch.index, watch.weights)
        torch.testing.assert_close(y, 2 * watch.y)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", ["refit", "distill"])
def test_streaming_repairs_as_resident_and_both_load_in_stock_transformers(
    kind: str, name: str, tmp_path: Path
) -> None:
    checkpoint = saved(kind, tmp_path / "model")
    kept, text = plan(checkpoint), batches()
    if kind == "granitemoe":  # one domain: the fits on random tokens help no other
        text = [replace(b, domain=0) for b in text]
    model = load(tmp_path / "model")
    done = walk(model, kept, name, tmp_path / "resident", text)
    assert any(d.repair == "refit" or d.repair == name for d in done)
    assert all(d.after <= d.before and d.tuned_after <= d.tuned_before for d in done)

    layered = LayeredModel(
        checkpoint.path, checkpoint.config, dtype=torch.float32, device=torch.device("cpu")
    )
    (tmp_path / "streaming").mkdir()
    again = Repairer(
        StreamingEngine(layered), kept, name, folder=tmp_path / "streaming", key="k"
    ).run(text)
    assert again == done
    for file in sorted((tmp_path / "resident").iterdir()):
        other = tmp_path / "streaming" / file.name
        with safe_open(file, "pt") as a, safe_open(other, "pt") as b:
            assert set(a.keys()) == set(b.keys())
            for key in a.keys():  # noqa: SIM118
                assert torch.equal(a.get_tensor(key), b.get_tensor(key)), key

    write_model(checkpoint, kept, tmp_path / "out", repaired=tmp_path / "resident")
    loaded = load(tmp_path / "out")
    ids = batches()[0].input_ids
    with torch.no_grad():
        assert torch.equal(loaded(input_ids=ids).logits, model(input_ids=ids).logits)


@pytest.mark.nightly
def test_the_reference_model_comes_nearer_to_itself_also_on_disk(tmp_path: Path) -> None:
    """The reference model: on random weights and tokens nothing learned carries over."""
    checkpoint = Checkpoint(str(MODEL))
    kept, original = plan(checkpoint), load(MODEL)
    text = sample(
        expand([parse_source(str(CALIBRATION))]), checkpoint.tokenizer(), samples=24, length=64,
        seed=0,
    ).batches(4)  # fmt: skip
    before = {n: p.detach().clone() for n, p in original.named_parameters()}
    ids = torch.cat([b.input_ids for b in text[:2]])
    distances = {}
    for name in (None, "scale", "refit", "distill"):
        model = copy.deepcopy(original)
        if name is None:
            cut(model, kept)
        else:
            folder = tmp_path / name
            folder.mkdir()
            engine = StreamingEngine(LoadedLayers(model))
            done = Repairer(engine, kept, name, folder=folder).run(text)
        with torch.no_grad():
            a = original(input_ids=ids, output_hidden_states=True).hidden_states[-1]
            b = model(input_ids=ids, output_hidden_states=True).hidden_states[-1]
        distances[name] = float((a - b).square().sum())
    assert distances["distill"] < distances["refit"] < distances["scale"] < distances[None]
    assert any(d.epoch for d in done)  # so that router, gate and up were written as well
    write_model(checkpoint, kept, tmp_path / "out", repaired=tmp_path / "distill")
    on_disk = load(tmp_path / "out", torch.bfloat16).state_dict()  # as the reference is
    for key, value in model.state_dict().items():
        assert torch.equal(on_disk[key], value.bfloat16()), key
    # distillation stays within the blocks, and does change what no cut changes there
    inside = tuple(b.name + "." for b in checkpoint.blocks)
    changed = [n for n, p in model.named_parameters() if not _same(p, before[n])]
    assert all(n.startswith(inside) for n in changed)
    assert any("shared_expert.up_proj" in n for n in changed)


def _same(a: Tensor, b: Tensor) -> bool:
    return a.shape == b.shape and torch.equal(a, b)


def test_a_constant_needs_a_bias() -> None:
    check = repair("novice").check  # type: ignore[attr-defined]
    check(find_blocks(tiny_model("gpt_oss"))[0].experts)
    with pytest.raises(ValueError, match=r"no bias that a constant could be folded into"):
        check(find_blocks(tiny_model("qwen2_moe"))[0].experts)


@pytest.mark.parametrize("name", sorted(repairs()))
def test_what_does_not_help_is_not_applied(name: str) -> None:
    """With every expert kept there is nothing to make good."""
    model = tiny_model("gpt_oss" if name == "novice" else "qwen2_moe").eval()
    before = copy.deepcopy(model.state_dict())
    kept = {b.name: list(range(b.num_experts)) for b in find_blocks(model)}
    for done in walk(model, kept, name):
        assert (done.repair, done.epoch) == ("none", 0)
    for key, value in model.state_dict().items():
        assert torch.equal(value, before[key]), key


def test_a_walk_goes_on_where_it_was_killed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    original = tiny_model("qwen2_moe").eval()
    kept = {b.name: some(b, i, uniform=True) for i, b in enumerate(find_blocks(original))}
    whole = copy.deepcopy(original)
    done = walk(whole, kept, "distill", tmp_path / "w")
    last = sorted((tmp_path / "w").iterdir())[-1]
    last.write_bytes(last.read_bytes()[:1000])  # damaged: counts as missing
    fits = []
    stock = refit.path
    monkeypatch.setattr(repair("distill"), "path", lambda *a, **k: fits.append(1) or stock(*a, **k))
    resumed = copy.deepcopy(original)
    assert walk(resumed, kept, "distill", tmp_path / "w") == done
    # of the last layer alone: without the domains left out, with them, then on all
    assert len(fits) == 3
    for a, b in zip(whole.parameters(), resumed.parameters(), strict=True):
        assert torch.equal(a, b)


def test_another_layout_is_not_written(tmp_path: Path) -> None:
    checkpoint = saved("qwen2_moe", tmp_path / "model")
    kept = plan(checkpoint)
    model = load(tmp_path / "model")
    with torch.no_grad():
        for b in find_blocks(model):
            b.experts.down_proj.mul_(1.5)  # as if the checkpoint kept them scaled
    walk(model, kept, "refit", tmp_path / "r")
    with pytest.raises(ValueError, match=r"another layout than the model.*--repair none"):
        write_model(checkpoint, kept, tmp_path / "out", repaired=tmp_path / "r")


def test_experts_behind_a_norm_are_refused() -> None:
    model = tiny_model("qwen2_moe")
    block = find_blocks(model)[0]
    block.experts.has_post_expert_norm = True
    with pytest.raises(ValueError, match=r"not a linear map of down_proj.*--repair none"):
        Repairer(StreamingEngine(LoadedLayers(model)), {block.name: [0, 1, 2, 3]}, "refit")
