"""Agreement against a plain computation in float64, position by position."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from places import HELDOUT, MODEL
from tiny import tiny_model
from torch import Tensor
from transformers import AutoTokenizer

import moe_fair
from moe_fair.core.recipe import Recipe
from moe_fair.engines.batch import Batch, quietly
from moe_fair.evaluate import Agreement, Agreements, agreement
from moe_fair.evaluate.record import load_agreement, save_agreement
from moe_fair.moe.checkpoint_source import Checkpoint
from moe_fair.moe.engine_choice import start
from moe_fair.pipelines.evaluate import run_agreement
from moe_fair.pipelines.moe import heldout_set

pytestmark = pytest.mark.slow  # whole runs, by and large

TEXT: dict[str, Any] = {"heldout": str(HELDOUT), "heldout_samples": 12, "length": 48}


class Ready:
    """An engine whose logits are known."""

    def __init__(self, logits: Sequence[Tensor]) -> None:
        self._logits = logits

    def logits(self, batches: Sequence[Batch]) -> Iterator[Tensor]:
        return iter(self._logits)


def test_formulas() -> None:
    """Three sequences of two domains, one padded, against sums in Python's own floats."""
    generator = torch.Generator().manual_seed(0)
    vocabulary, length = 7, 5
    batches, p, q = [], [], []
    for domain, size in ((0, 2), (1, 1)):
        ids = torch.randint(vocabulary, (size, length), generator=generator)
        mask = torch.ones_like(ids)
        mask[-1, 3:] = 0
        batches.append(Batch(ids, mask, torch.arange(size), domain))
        p.append(3 * torch.randn(size, length, vocabulary, generator=generator))
        q.append(p[-1] + torch.randn(size, length, vocabulary, generator=generator))
    found = agreement(Ready(p), Ready(q), batches, ("a", "b"))  # type: ignore[arg-type]

    wanted: dict[str, list[list[float]]] = {"a": [], "b": []}
    for batch, logits_p, logits_q in zip(batches, p, q, strict=True):
        for i, ids in enumerate(batch.input_ids.tolist()):
            for t in range(length - 1):
                if not batch.mask[i, t + 1]:
                    continue
                a, b = (softmax(x[i, t].tolist()) for x in (logits_p, logits_q))
                wanted["ab"[batch.domain]].append(
                    [
                        -math.log(a[ids[t + 1]]),
                        -math.log(b[ids[t + 1]]),
                        math.fsum(x * math.log(x / y) for x, y in zip(a, b, strict=True)),
                        float(a.index(max(a)) == b.index(max(b))),
                        math.fsum(min(x, y) for x, y in zip(a, b, strict=True)),
                    ]
                )
    for name, rows in {**wanted, "mean": wanted["a"] + wanted["b"]}.items():
        got = found.mean if name == "mean" else found.domains[name]
        means = [math.fsum(column) / len(rows) for column in zip(*rows, strict=True)]
        assert got.tokens == len(rows)
        assert [got.original_loss, got.pruned_loss, got.kl, got.top1, got.acceptance] == (
            pytest.approx(means, rel=1e-12)
        )
    assert 0 < found.mean.top1 < 1


def softmax(logits: list[float]) -> list[float]:
    total = math.fsum(math.exp(x) for x in logits)
    return [math.exp(x) / total for x in logits]


def test_two_vocabularies_are_refused() -> None:
    ids = torch.zeros(1, 4, dtype=torch.long)
    batch = Batch(ids, torch.ones_like(ids), torch.arange(1), 0)
    engines = Ready([torch.zeros(1, 4, 7)]), Ready([torch.zeros(1, 4, 8)])
    with pytest.raises(ValueError, match="predict 7 and 8 tokens"):
        agreement(*engines, [batch], ("a",))  # type: ignore[arg-type]


@pytest.fixture(scope="module")
def source() -> Checkpoint:
    return Checkpoint(str(MODEL))


def test_a_model_agrees_with_itself(source: Checkpoint, tmp_path: Path) -> None:
    found = run_agreement(Recipe(**TEXT), source, source, tmp_path)
    for a in (found.mean, *found.domains.values()):
        assert a.kl == 0
        assert a.top1 == 1
        assert a.acceptance == pytest.approx(1, abs=1e-12)
        assert a.original_loss == a.pruned_loss
    assert set(found.domains) == {"javascript", "python", "reference-manuals", "rust-docs"}
    assert found.mean.tokens == 12 * 47
    assert load_agreement(tmp_path) == found


@pytest.fixture(scope="module")
def pruned(tmp_path_factory: pytest.TempPathFactory, statistics_folder: Path) -> Checkpoint:
    folder = tmp_path_factory.mktemp("pruned") / "out"
    statistics = moe_fair.Statistics.load(statistics_folder)
    moe_fair.prune(str(MODEL), folder, plan=moe_fair.plan(statistics, experts=20), repair="none")
    return Checkpoint(str(folder))


def test_streaming_gives_the_same(source: Checkpoint, pruned: Checkpoint) -> None:
    """One layer at a time, and against losses that another path of the code measures."""
    resident, streaming = (
        run_agreement(Recipe(engine=engine, **TEXT), pruned, source, None)
        for engine in ("resident", "streaming")
    )
    assert resident == streaming
    assert 0.01 < resident.mean.kl < 5
    assert resident.mean.acceptance < 0.99
    # Pinsker: the total variation is at most sqrt(KL / 2), of means as well, the root being concave
    assert 1 - resident.mean.acceptance <= math.sqrt(resident.mean.kl / 2)


def test_losses_are_those_of_heldout(source: Checkpoint, pruned: Checkpoint) -> None:
    found = run_agreement(Recipe(**TEXT), pruned, source, None).mean
    text = heldout_set(Recipe(**TEXT), source)
    assert text is not None
    for checkpoint, loss in ((source, found.original_loss), (pruned, found.pruned_loss)):
        engine, _ = start(checkpoint, "resident", "auto", "auto", quietly)
        total = weight = 0.0
        for losses, weights in engine.losses(text.batches(4)):
            total += float((losses.double() * weights).sum())
            weight += float(weights.sum())
        assert loss == pytest.approx(total / weight, rel=1e-6)


def test_other_tokens_are_refused(source: Checkpoint, tmp_path: Path) -> None:
    tiny_model("qwen2_moe").save_pretrained(tmp_path)
    tokenizer = AutoTokenizer.from_pretrained(source.path)
    tokenizer.add_tokens(["<new>"])
    tokenizer.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="different vocabularies"):
        run_agreement(Recipe(**TEXT), Checkpoint(str(tmp_path)), source, None)


def test_text_is_asked_for(source: Checkpoint) -> None:
    with pytest.raises(ValueError, match="give --heldout"):
        run_agreement(Recipe(), source, source, None)


def test_a_broken_record_says_so(tmp_path: Path) -> None:
    one = Agreement(1, 2.0, 2.0, 0.0, 1.0, 1.0)
    save_agreement(tmp_path, Agreements(one, {"a": one}))
    file = tmp_path / "agreement.json"
    file.write_text(file.read_text()[:40])
    with pytest.raises(ValueError, match=r"is not JSON.*remove it"):
        load_agreement(tmp_path)
    file.write_text('{"mean": {"tokens": 1}, "domains": {}}')
    with pytest.raises(ValueError, match="not a table of ours"):
        load_agreement(tmp_path)
