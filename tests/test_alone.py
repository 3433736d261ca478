"""Experts removed alone, measured: against masked models, the score against its formula, used."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from masking import masked
from places import CALIBRATION, MODEL
from tiny import tiny_model
from torch import Tensor
from transformers import AutoTokenizer

import moe_fair
from moe_fair.cli import main
from moe_fair.core.recipe import Recipe
from moe_fair.core.units import GroupView, Statistics, UnitGroup
from moe_fair.moe.calibration_text import CalibrationSet
from moe_fair.moe.checkpoint_source import Checkpoint
from moe_fair.moe.criteria import criterion
from moe_fair.moe.criteria.counterfactual import agreement
from moe_fair.pipelines import moe as pipeline
from moe_fair.pipelines.removal_costs import holds_alone, measure_alone, share

SCORE = "counterfactual-measured"
Opened = tuple[Checkpoint, CalibrationSet]


@pytest.fixture(scope="module")
def recipe(tmp_path_factory: pytest.TempPathFactory, settings: dict[str, object]) -> Recipe:
    """Of a model with few experts."""
    folder = tmp_path_factory.mktemp("model")
    tokenizer = AutoTokenizer.from_pretrained(MODEL)
    tiny_model("qwen2_moe", vocab_size=len(tokenizer)).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return Recipe(model=str(folder), curve_samples=4, **settings)  # type: ignore[arg-type]


@pytest.fixture(scope="module")
def base(recipe: Recipe, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Statistics without anything measured."""
    folder = tmp_path_factory.mktemp("calibrated") / "stats"
    given = {k: v for k, v in recipe.to_dict().items() if k in recipe.given}
    del given["curve_samples"]  # nothing is measured
    pipeline.calibrate(Recipe(**given), folder)
    return folder


@pytest.fixture(scope="module")
def opened(recipe: Recipe) -> Opened:
    source = pipeline.open_model(recipe)
    return source, pipeline.calibration_set(recipe, source, print)


@pytest.fixture(scope="module")
def measured(
    tmp_path_factory: pytest.TempPathFactory, base: Path, recipe: Recipe, opened: Opened
) -> tuple[Statistics, Path]:
    """Every expert alone, and the folder in which each layer's measurements lie."""
    work = tmp_path_factory.mktemp("alone")
    source, text = opened
    return measure_alone(recipe, source, text, Statistics.load(base), work), work


@pytest.mark.slow
def test_changes_are_those_of_masked_models(
    measured: tuple[Statistics, Path], opened: Opened
) -> None:
    statistics, _ = measured
    source, text = opened
    part = share(text, 4)
    model = source.load("float32", "cpu").eval()

    def losses() -> Tensor:
        """[D] summed loss of each domain."""
        total = torch.zeros(len(part.domains), dtype=torch.float64)
        for batch in part.batches(4):
            with torch.no_grad():
                logits = model(input_ids=batch.input_ids).logits[:, :-1].double()
            picked = logits.log_softmax(-1).gather(-1, batch.input_ids[:, 1:, None])
            total[batch.domain] -= picked.sum()
        return total

    whole = losses()
    for g, e in ((statistics.groups[0], 7), (statistics.groups[-1], 3)):
        with masked(model, {g.name: [i for i in range(g.size) if i != e]}):
            change = losses() - whole
        found = statistics.sums[g.name]["alone_change"][:, e]
        torch.testing.assert_close(found, change, rtol=0, atol=2e-4)
        assert float(found.abs().max()) > 1e-2


@pytest.mark.slow
def test_the_share_brings_its_own_first_and_second_order(
    measured: tuple[Statistics, Path], recipe: Recipe, opened: Opened
) -> None:
    """What is compared on the share was gathered on the share."""
    statistics, _ = measured
    source, text = opened
    part = share(text, 4)
    own = pipeline.collect(recipe, source, part)
    assert own is not None
    for g in statistics.groups:
        mine, have = own.sums[g.name], statistics.sums[g.name]
        torch.testing.assert_close(have["alone_first"], mine["removed_first"])
        diagonal = torch.stack([c.diagonal() for c in mine["removed_gram"]])
        torch.testing.assert_close(have["alone_fisher"], diagonal / 2)
        assert have["alone_tokens"].sum(0).tolist() == [part.tokens] * g.size
        # and what was gathered on the whole text is as it was
        assert float(have["tokens"].sum()) > float(mine["tokens"].sum())


def test_a_killed_measurement_goes_on_at_the_missing_layer(
    measured: tuple[Statistics, Path], base: Path, recipe: Recipe, opened: Opened
) -> None:
    statistics, work = measured
    files = sorted((work / "layers").iterdir())
    assert len(files) == len(statistics.groups)
    files[0].unlink()
    said: list[str] = []
    source, text = opened
    again = measure_alone(recipe, source, text, Statistics.load(base), work, said.append)
    assert f"{len(files) - 1} layers were done before" in said[0]
    for g in statistics.groups:
        for name, t in again.sums[g.name].items():
            assert torch.equal(t, statistics.sums[g.name][name])


def view_of(seed: int, domains: int, size: int = 6, **given: Tensor) -> GroupView:
    """Random sums of a group, some of them replaced."""
    g = torch.Generator().manual_seed(seed)

    def drawn(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=g, dtype=torch.float64)

    tokens = torch.arange(1.0, domains + 1, dtype=torch.float64) * 100
    vectors = drawn(domains, 20, size)
    sums = {
        "alone_change": drawn(domains, size) + 3,
        "alone_first": drawn(domains, size),
        "alone_fisher": drawn(domains, size).square() + 0.1,
        "alone_tokens": (tokens / 4).unsqueeze(1).expand(-1, size),
        "removed_first": 10 * drawn(domains, size),
        "removed_first_sq": drawn(domains, size).square() * 50,
        "removed_gram": torch.einsum("dte,dtf->def", vectors, vectors),
    } | given
    count = torch.full((domains,), 8.0, dtype=torch.float64)
    names = tuple("abcdefg"[:domains])
    statistics = Statistics(
        groups=(UnitGroup("g", 0, size),), domains=names, sums={"g": sums}, constants={}, rows={},
        sequence_ids=torch.arange(8 * domains), tokens=tokens, sequences=count,
        sequence_domains=torch.arange(domains).repeat_interleave(8),
    )  # fmt: skip
    return statistics.view(statistics.groups[0])


@pytest.mark.parametrize(("seed", "domains"), [(0, 3), (1, 3), (2, 2), (3, 1)])
def test_the_score_is_its_formula(seed: int, domains: int) -> None:
    """Expert by expert in plain Python."""
    view = view_of(seed, domains)
    by = {k: v.tolist() for k, v in view.by_domain.items()}
    share_tokens = [t[0] for t in by["alone_tokens"]]
    n, m = 4 * sum(share_tokens), sum(share_tokens)
    size = view.group.size
    known = [
        sum(by["alone_change"][d][e] - by["alone_first"][d][e] for d in range(domains)) / m
        for e in range(size)
    ]
    near = [sum(by["alone_fisher"][d][e] for d in range(domains)) / m for e in range(size)]
    half = [sum(by["removed_gram"][d][e][e] for d in range(domains)) / 2 / n for e in range(size)]
    scaled = [sum(known) / sum(near) * h for h in half]
    first = [sum(by["removed_first"][d][e] for d in range(domains)) / n for e in range(size)]
    wanted = [
        (k + s) / 2 + f * float(a)
        for k, s, f, a in zip(known, scaled, first, agreement(view), strict=True)
    ]
    got = criterion(SCORE).score(view)
    torch.testing.assert_close(got, torch.tensor(wanted, dtype=torch.float64), rtol=1e-9, atol=0)


def test_a_layer_that_gains_by_every_removal_expects_nothing() -> None:
    """δ² scaled below 0 would turn its order round."""
    tokens = torch.tensor([[25.0], [50.0]], dtype=torch.float64)
    truth = torch.tensor([-5.0, -1, 0, -2, -9, -3], dtype=torch.float64)
    nothing = torch.zeros(2, 6, dtype=torch.float64)
    view = view_of(4, 2, alone_change=tokens * truth, alone_first=nothing, removed_first=nothing)
    torch.testing.assert_close(criterion(SCORE).score(view), truth / 2)


@pytest.mark.slow
def test_the_commands_measure_what_the_score_needs(
    tmp_path: Path, base: Path, recipe: Recipe, fails: Callable[..., str]
) -> None:
    assert recipe.model is not None
    said = fails("plan", base, "--ratio", ".25", "--method", SCORE)
    assert "alone_change" in said
    assert f"--for {SCORE}" in said
    done = moe_fair.prune(
        recipe.model, tmp_path / "out", statistics=base, method=SCORE, ratio=0.25,
        repair="none", curve_samples=2, engine="resident", length=64,
    )  # fmt: skip
    saved = Statistics.load(tmp_path / "out" / "moe_fair")
    assert holds_alone(saved)
    assert saved.metadata["alone"]["sequences"] == 2
    again = moe_fair.plan(saved, method=SCORE, ratio=0.25)
    assert again.kept == done.plan.kept
    text = ["-c", str(CALIBRATION), "--samples", "4", "--length", "16", "--curve-samples", "2"]
    with pytest.raises(SystemExit, match="0"):
        main(
            [
                "calibrate",
                recipe.model,
                *text,
                "--for",
                f"default,{SCORE}",
                "-o",
                str(tmp_path / "stats"),
            ]
        )
    assert holds_alone(Statistics.load(tmp_path / "stats"))
