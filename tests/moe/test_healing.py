"""Healing: the divergence, the steps, a killed training, what is written, and what is refused."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from flow import kept_experts
from safetensors import safe_open
from tiny import tiny_model

from moe_fair.core.recipe import Recipe
from moe_fair.engines.processes import ALONE, Team
from moe_fair.moe import healing
from moe_fair.moe.calibration_text import CalibrationSet
from moe_fair.moe.checkpoint_source import Checkpoint
from moe_fair.moe.checkpoint_writer import write_model
from moe_fair.moe.greedy_text import continuations, repetition
from moe_fair.moe.healed_weights import check_stored, healed_parameters, write_over
from moe_fair.moe.healing import Healer
from moe_fair.moe.healing_text import HealingText, batches_of, healing_text
from moe_fair.moe.overlay import UnknownLayoutError
from moe_fair.moe.predictions import Predictions, divergence, top_predictions
from moe_fair.pipelines.heal import heal_model
from moe_fair.pipelines.oom_retry import RetryingEngine

LENGTH = 24


def text(sequences: int = 30, domains: int = 2, length: int = LENGTH) -> CalibrationSet:
    """Random tokens; every seventh sequence is shorter."""
    g = torch.Generator().manual_seed(5)
    rows = []
    for i in range(sequences):
        n = length - (4 if i % 7 == 3 else 0)
        row = torch.randint(3, 128, (n,), generator=g).tolist()
        rows.append((tuple(row), i * domains // sequences))
    return CalibrationSet(tuple("ab"[:domains]), tuple(rows))


def predicted(model: Any, its: CalibrationSet) -> Callable[[int], Predictions]:
    """What a model predicts behind each token but the last, sequence by sequence."""
    found = {}
    for i, (ids, _) in enumerate(its.sequences):
        with torch.no_grad():
            logits = model(input_ids=torch.tensor([ids]), use_cache=False).logits
        p = top_predictions(logits)
        found[i] = Predictions(*(t[0, :-1] for t in (p.ids, p.log_p, p.rest)))
    return found.__getitem__


def healer(
    pruned: Checkpoint,
    steps: HealingText,
    wanted: Callable[[int], Predictions],
    folder: Path | None = None,
    team: Team = ALONE,
    **more: Any,
) -> Healer:
    model = pruned.load("float32", "cpu")
    weights = healed_parameters(model)
    stored = dict.fromkeys(weights, torch.float32)
    return Healer(
        model, weights, stored, steps, wanted, most=4, team=team, folder=folder, key="k", **more
    )


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Checkpoint]:
    """A tiny original, and its checkpoint with unequal counts."""
    folder = tmp_path_factory.mktemp("pair")
    model = tiny_model("qwen2_moe")
    model.save_pretrained(folder / "original")
    source = Checkpoint(str(folder / "original"))
    write_model(source, kept_experts(source, uniform=False), folder / "pruned")
    return model, Checkpoint(str(folder / "pruned"))


@pytest.mark.parametrize("top", [1, 5, 40, 64])
def test_divergence_is_that_of_the_top_tokens_and_the_rest(top: int) -> None:
    """By a loop in float64; whole where the top is the vocabulary."""
    g = torch.Generator().manual_seed(0)
    p, q = (3 * torch.randn(2, 3, 40, generator=g) for _ in range(2))
    q[..., 7] = -torch.inf  # a token that neither can say
    p[..., 7] = -torch.inf
    found = divergence(q, top_predictions(p, top))
    for b in range(2):
        for t in range(3):
            a, c = (x[b, t].double().softmax(-1).tolist() for x in (p, q))
            first = sorted(range(40), key=lambda v: -a[v])[:top]
            others = [v for v in range(40) if v not in first]
            pairs = [(a[v], c[v]) for v in first]
            pairs.append((sum(a[v] for v in others), sum(c[v] for v in others)))
            want = sum(x * float(torch.tensor(x / y).log()) for x, y in pairs if x > 0)
            assert float(found[b, t]) == pytest.approx(want, abs=1e-5)
    whole = torch.nn.functional.kl_div(
        q.double().log_softmax(-1)[..., :7], p.double().log_softmax(-1)[..., :7],
        reduction="none", log_target=True,
    )  # fmt: skip
    assert whole.isfinite().all()
    assert (divergence(p, top_predictions(p, top)).abs() < 1e-6).all()


def test_divergence_pulls_the_rest_too() -> None:
    """Renormalised to the top, a gradient could not tell tokens outside of it from none."""
    p = torch.tensor([[4.0, 3.0, 0.0, 0.0, 0.0, 0.0]])
    q = torch.tensor([[4.0, 3.0, 5.0, 0.0, 0.0, 0.0]], requires_grad=True)
    [gradient] = torch.autograd.grad(divergence(q, top_predictions(p, 2)).sum(), q)
    assert gradient[0, 2] > 0.1  # less of what the original leaves to the rest
    assert (gradient[0, :2] < 0).all()


def test_steps_use_up_the_tokens_and_judges_teach_nothing() -> None:
    its = text(40)
    for tokens in (LENGTH, 500, 3000):
        found = healing_text(its, tokens, seed=0)
        taught = {i for step in found.steps for i in step}
        assert not taught & set(found.judging)
        assert found.tokens <= tokens
        assert found.tokens > tokens - 2 * LENGTH * len(found.steps[0])
    again, other = healing_text(its, 3000, seed=0), healing_text(its, 3000, seed=1)
    assert again == found
    assert other.steps != found.steps


def test_each_process_has_the_same_places_in_every_step() -> None:
    found = healing_text(text(40), 3000, seed=0)
    shares = [set(found.teaching(Team(rank=r, size=2))) for r in range(2)]
    assert not shares[0] & shares[1]
    assert shares[0] | shares[1] == {i for step in found.steps for i in step}
    assert all(i in shares[p % 2] for step in found.steps for p, i in enumerate(step))
    judged = [found.judged_by(Team(rank=r, size=2)) for r in range(2)]
    assert sorted(judged[0] + judged[1]) == list(found.judging)


def test_a_domain_that_nobody_judges_is_refused() -> None:
    its = text(12, domains=2)
    few = replace(its, sequences=(*its.sequences[:10], (its.sequences[0][0], 1)))
    few = replace(
        few, sequences=tuple((ids, int(i > 9)) for i, (ids, _) in enumerate(few.sequences))
    )
    with pytest.raises(ValueError, match=r"b has none among them.*--samples"):
        healing_text(few, 1000, seed=0)
    with pytest.raises(ValueError, match="less than one sequence"):
        healing_text(its, 3, seed=0)


def test_batches_mix_domains_and_keep_numbers() -> None:
    its = text(30)
    for batch in batches_of(its, [29, 3, 0, 17], 3):
        for i, row, mask in zip(
            batch.sequence_ids.tolist(), batch.input_ids, batch.mask, strict=True
        ):
            assert tuple(row[mask.bool()].tolist()) == its.sequences[i][0]


class _Killed(Exception):
    pass


@pytest.mark.slow
def test_a_killed_training_goes_on_bitwise(
    pair: tuple[Any, Checkpoint], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(healing, "SAVED", 2)
    monkeypatch.setattr(healing, "STEP", 0.001)
    original, pruned = pair
    its = text()
    wanted, steps = predicted(original, its), healing_text(its, 4 * 24 * LENGTH, seed=0)
    assert len(steps.steps) > 3
    whole = healer(pruned, steps, wanted)
    whole.run()
    calls = 0

    def until_killed(number: int) -> Predictions:
        nonlocal calls
        calls += 1
        if calls > 40:
            raise _Killed
        return wanted(number)

    with pytest.raises(_Killed):
        healer(pruned, steps, until_killed, tmp_path).run()
    assert (tmp_path / "state.safetensors").is_file()
    again = healer(pruned, steps, wanted, tmp_path)
    again.run()
    assert again.looks == whole.looks
    assert again.best == whole.best
    for n, c in whole.changes.items():
        assert torch.equal(c.value(), again.changes[n].value()), n
    assert whole.kept.keys() == again.kept.keys()
    assert all(torch.equal(t, again.kept[n]) for n, t in whole.kept.items())
    other = healer(pruned, steps, wanted, tmp_path)
    other.key = "of another run"
    assert not other._resume()


@pytest.mark.slow
def test_less_memory_gives_the_same_gradient(pair: tuple[Any, Checkpoint]) -> None:
    """Single sequences, and layers that run again in the backward."""
    original, pruned = pair
    its = text()
    steps = healing_text(its, 1000, seed=0)
    found = []
    for less in range(4):
        one = healer(pruned, steps, predicted(original, its))
        for _ in range(less):
            assert one._less("tried")
        one._gradient(steps.steps[0], 100)
        found.append(
            {(n, i): t.grad for n, c in one.changes.items() for i, t in enumerate(c.trained)}
        )
    assert one.most == 1
    assert one.layers
    assert not one._less("tried")
    for n, want in found[0].items():
        for other in found[1:]:
            assert (other[n] - want).abs().max() <= 1e-5 * want.abs().max().clamp(min=1e-3), n


def test_memory_that_runs_out_is_made_do_with(
    pair: tuple[Any, Checkpoint], monkeypatch: pytest.MonkeyPatch
) -> None:
    original, pruned = pair
    its = text()
    said: list[str] = []
    one = healer(pruned, healing_text(its, 600, seed=0), predicted(original, its), say=said.append)
    terms = one._terms

    def short(batch: Any) -> Any:
        if len(batch.mask) > 1:
            raise MemoryError("no room")
        return terms(batch)

    monkeypatch.setattr(one, "_terms", short)
    one.run()
    assert one.step
    assert ["with 2 sequences" in x for x in said][:1] == [True]
    monkeypatch.setattr(one, "_terms", lambda batch: short(batch) and 1 / 0)
    monkeypatch.setattr(one, "most", 1)
    with pytest.raises(ZeroDivisionError):  # no other error is taken for it
        one._learn()


@pytest.mark.parametrize("where", ["original", "training"])
@pytest.mark.slow
def test_a_run_without_memory_ends_with_what_was_repaired(
    where: str, pair: tuple[Any, Checkpoint], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whichever model finds no room."""
    _, pruned = pair
    source = Checkpoint(str(pruned.path.parent / "original"))

    def never(*_: Any, **__: Any) -> Any:
        if where == "original":
            raise ValueError("out of memory: no room; there is nothing smaller to try")
        raise MemoryError("no room")

    home, name = (RetryingEngine, "logits") if where == "original" else (Healer, "_terms")
    monkeypatch.setattr(home, name, never)
    before = {f.name: f.read_bytes() for f in pruned.path.iterdir()}
    said: list[str] = []
    recipe = Recipe().with_settings({"model": source.model, "heal": 500, "dtype": "float32"})
    work = tmp_path / "work"
    assert heal_model(recipe, source, pruned.path, text(), work, said.append, ALONE) is None
    assert said[-1] == "note: not healed: out of memory (no room)"
    assert {f.name: f.read_bytes() for f in pruned.path.iterdir()} == before


def header(folder: Path) -> dict[str, tuple[str, list[int]]]:
    found = {}
    for file in sorted(folder.glob("*.safetensors")):
        with safe_open(file, framework="pt") as f:
            for n in f.keys():  # noqa: SIM118
                found[n] = (f.get_slice(n).get_dtype(), f.get_slice(n).get_shape())
    return found


@pytest.mark.parametrize("kind", ["qwen2_moe", "gpt_oss", "deepseek_v3"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_what_is_written_is_stock(kind: str, dtype: torch.dtype, tmp_path: Path) -> None:
    """The same names, shapes and types; unequal counts; values as stock transformers loads them."""
    tiny_model(kind).to(dtype).save_pretrained(tmp_path / "original")
    source = Checkpoint(str(tmp_path / "original"))
    folder = tmp_path / "pruned"
    uniform = kind == "deepseek_v3"
    write_model(source, kept_experts(source, uniform), folder)
    before, pruned = header(folder), Checkpoint(str(folder))
    model = pruned.load("float32", "cpu")
    state = {n: t.clone() for n, t in model.state_dict().items()}
    weights = {n: p.detach() for n, p in healed_parameters(model).items()}
    check_stored(pruned, weights)
    new = {n: (w + 0.25).to(dtype) for n, w in weights.items()}
    write_over(pruned, new)
    assert header(folder) == before
    loaded = Checkpoint(str(folder)).load("float32", "cpu").state_dict()
    for n, t in state.items():
        want = new[n].float() if n in new else t
        assert torch.equal(loaded[n], want), n
    outside = [
        n for n in state if n not in new and dict(model.named_parameters()).get(n) is not None
    ]
    assert all("layers." not in n for n in outside)
    assert outside


def test_another_layout_is_found_out(pair: tuple[Any, Checkpoint]) -> None:
    _, pruned = pair
    model = pruned.load("float32", "cpu")
    weights = {n: p.detach().clone() for n, p in healed_parameters(model).items()}
    name = next(n for n in weights if n.endswith("o_proj.weight"))
    weights[name] = weights[name].T.contiguous()
    with pytest.raises(UnknownLayoutError, match="o_proj"):
        check_stored(pruned, weights)


def test_continuations_are_those_of_generate(pair: tuple[Any, Checkpoint]) -> None:
    original, _ = pair
    model = copy.deepcopy(original)
    prompts = torch.tensor([ids[:9] for ids, _ in text(5).sequences])
    from moe_fair.engines.resident import ResidentEngine

    engine = ResidentEngine(model)

    def choices(batch: Any, n: int) -> torch.Tensor:
        [logits] = engine.logits([batch])
        return logits[:, -n:].argmax(-1)

    found = continuations(choices, prompts, 2)
    want = model.generate(
        prompts, attention_mask=torch.ones_like(prompts), do_sample=False,
        max_new_tokens=found.shape[1], eos_token_id=None,
    )  # fmt: skip
    assert torch.equal(found, want[:, 9:])


def test_repetition_counts_grams_that_stood_before() -> None:
    rows = torch.tensor([[1, 2, 3, 4, 5, 6, 7], [1, 1, 1, 1, 1, 1, 1], [1, 2, 3, 4, 1, 2, 3]])
    assert repetition(rows).tolist() == [0.0, 0.75, 0.0]
