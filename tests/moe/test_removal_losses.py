"""Measured removals against whole models with masked routers; the command, killed and resumed."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from masking import masked
from places import CALIBRATION, MODEL
from tiny import tiny_model

from moe_fair.cli import main
from moe_fair.core.oracle import Oracle
from moe_fair.core.recipe import Recipe
from moe_fair.engines.batch import Batch
from moe_fair.moe.blocks import find_blocks
from moe_fair.moe.removal import RemovalLosses
from moe_fair.pipelines import moe as pipeline
from moe_fair.pipelines.removal_losses import Removals

pytestmark = pytest.mark.slow  # whole runs, by and large


def batches() -> list[Batch]:
    g = torch.Generator().manual_seed(3)
    ids = torch.randint(3, 128, (3, 24), generator=g)
    mask = torch.ones_like(ids)
    mask[1, 15:] = 0
    return [
        Batch(ids, mask, torch.arange(3), 0),
        Batch(ids[:2, :9], mask[:2, :9], torch.arange(3, 5), 1),
    ]


def loss(model: Any, text: list[Batch] | None = None) -> float:
    """Mean next-token loss over the batches, written anew."""
    total, count = 0.0, 0
    for b in batches() if text is None else text:
        with torch.no_grad():
            logits = model(b.input_ids, attention_mask=b.mask).logits
        for row, ids, mask in zip(logits.double(), b.input_ids, b.mask, strict=True):
            n = int(mask.sum())
            p = row[: n - 1].log_softmax(-1)
            total -= float(p[torch.arange(n - 1), ids[1:n]].sum())
            count += n - 1
    return total / count


@pytest.mark.parametrize(("kind", "still"), [("mixtral", True), ("qwen2_moe", False)])
def test_experts_without_tokens_change_what_the_router_makes_of_their_share(
    kind: str, still: bool
) -> None:
    """Nothing where the top k are renormalised; elsewhere their share goes to the others."""
    model: Any = tiny_model(kind).eval()
    [block, *_] = find_blocks(model)
    every = {block.name: [[e] for e in range(block.num_experts)]}
    ids = torch.tensor([[5, 9, 77], [64, 3, 3]])
    batch = Batch(ids, torch.tensor([[1, 1, 1], [1, 1, 0]]), torch.arange(2), 0)
    seen: set[int] = set()
    hook = block.experts.register_forward_pre_hook(
        lambda _, given: seen.update(given[1][batch.mask.flatten().bool()].flatten().tolist())
    )
    whole = loss(model, [batch])
    hook.remove()
    [(_, [change])] = RemovalLosses(model, [batch]).measure(every)
    unused = set(range(block.num_experts)) - seen
    assert unused
    assert {float(change[e]) == 0 for e in unused} == {still}
    for e in range(block.num_experts):
        with masked(model, {block.name: [i for i in range(block.num_experts) if i != e]}):
            assert float(change[e]) / 3 == pytest.approx(loss(model, [batch]) - whole, abs=2e-6)


# top-k of a softmax; renormalised; groups and bias; biases of the router; a residual multiplier
@pytest.mark.parametrize("kind", ["qwen2_moe", "mixtral", "deepseek_v3", "gpt_oss", "granitemoe"])
def test_removals_equal_masked_models(kind: str) -> None:
    model: Any = tiny_model(kind).eval()
    blocks = find_blocks(model)
    per_group = [[0], [3], [1, 2]]
    sets = {b.name: per_group for b in blocks}
    losses = RemovalLosses(model, batches())
    found = {n: c.sum(0) / losses.tokens for n, c in losses.measure(sets)}
    base = loss(model)
    assert losses.loss == pytest.approx(base, abs=1e-6)
    assert losses.tokens == 23 + 14 + 23 + 8 + 8
    for b in blocks:
        for r, gone in enumerate(per_group):
            with masked(model, {b.name: [e for e in range(b.num_experts) if e not in gone]}):
                want = loss(model) - base
            assert float(found[b.name][r]) == pytest.approx(want, abs=2e-6), (b.name, gone)
    assert max(float(c.abs().max()) for c in found.values()) > 1e-5


SMALL = ["-c", str(CALIBRATION), "--samples", "2", "--length", "16"]


@pytest.mark.nightly
def test_the_command_goes_on_where_it_was_killed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    measure = RemovalLosses.measure
    measured: list[str] = []

    def dies(self: Any, sets: Any) -> Any:
        for name, change in measure(self, sets):
            measured.append(name)
            yield name, change
            if len(measured) == 2:
                raise OSError("the power is gone")

    monkeypatch.setattr(RemovalLosses, "measure", dies)
    arguments = ["oracle", str(MODEL), *SMALL, "-o", str(tmp_path / "o")]
    with pytest.raises(SystemExit, match="2"):
        main(arguments)
    assert not (tmp_path / "o").exists()
    with pytest.raises(SystemExit, match="0"):
        main(arguments)
    assert len(measured) == len(set(measured)) == 6  # none was measured twice
    assert "going on: 2 of 6 layers" in (screen := capsys.readouterr()).err
    for said in ("counterfactual", "Pearson"):
        assert said in screen.out
    oracle = Oracle.load(tmp_path / "o" / "oracle.safetensors")
    assert {len(c) for c in oracle.changes.values()} == {60}
    table = json.loads((tmp_path / "o" / "agreement.json").read_text())
    assert set(table) >= {"reap", "counterfactual", "taylor-sq", "frequency"}
    assert all(-1 <= v <= 1 for a in table.values() for v in a.values())


@pytest.mark.parametrize(
    ("other", "goes_on"),
    [
        ({}, True),
        ({"dtype": "float32"}, True),  # what it is on a CPU anyway
        ({"dtype": "bfloat16"}, False),
        ({"batch_size": 1}, False),
        ({"seed": 1}, False),
    ],
)
def test_only_the_same_measurement_goes_on(
    other: dict[str, Any], goes_on: bool, tmp_path: Path, settings: dict[str, Any]
) -> None:
    def removals(recipe: Recipe) -> Removals:
        source = pipeline.open_model(recipe)
        text = pipeline.calibration_set(recipe, source, print)
        return Removals(recipe, source, text, {source.blocks[-1].name: [[0], [1, 2]]}, tmp_path)

    recipe = Recipe(model=str(MODEL), device="cpu", **settings | {"samples": 2, "length": 16})
    first = removals(recipe)
    assert first.earlier == 0
    first.measure("removing")
    again = removals(recipe.with_settings(other))
    assert again.earlier == int(goes_on)
    if goes_on:
        assert again.loss == first.loss
        [(a, b)] = zip(again.changes.values(), first.changes.values(), strict=True)
        assert torch.equal(a, b)
