"""Text in the model's own words: drawn from its prediction, where and as often as said."""

from __future__ import annotations

import pytest
import torch
from tiny import tiny_model

from moe_fair.engines.batch import Batch
from moe_fair.engines.loaded import LoadedLayers
from moe_fair.engines.resident import ResidentEngine
from moe_fair.engines.streaming import StreamingEngine
from moe_fair.moe.judging import HELD_OUT, teaching
from moe_fair.moe.layer_distillation import epochs_for
from moe_fair.moe.resampled_text import MOST, SHARE, TOKENS, copies_for, resampled_text


def text(rows: int = 6, length: int = 12) -> list[Batch]:
    g = torch.Generator().manual_seed(5)
    ids = torch.randint(3, 128, (rows, length), generator=g)
    mask = torch.ones_like(ids)
    mask[1, 8:] = 0
    return [Batch(ids, mask, torch.arange(rows), 0)]


def test_tokens_are_drawn_from_the_models_prediction() -> None:
    model = tiny_model("qwen2_moe").eval()
    # untrained predictions are nearly flat: sharpened, so that a wrong one shows
    with torch.no_grad():
        model.lm_head.weight.mul_(12)
    [batch] = text(rows=2, length=4)
    batch = Batch(batch.input_ids, torch.ones_like(batch.mask), batch.sequence_ids, 0)
    copies = 6000
    drawn = torch.stack(
        [b.input_ids for b in resampled_text(ResidentEngine(model), [batch], copies, seed=0)]
    )
    with torch.no_grad():
        logits = model(input_ids=batch.input_ids, use_cache=False).logits
    p = SHARE * logits[:, :-1].double().softmax(-1)
    p.scatter_add_(2, batch.input_ids[:, 1:, None], torch.full((2, 3, 1), 1 - SHARE).double())
    assert p.max() < 0.9
    seen = torch.nn.functional.one_hot(drawn[:, :, 1:], logits.shape[-1]).double().mean(0)
    allowed = 5 * (p * (1 - p) / copies).sqrt() + 1e-3
    assert ((seen - p).abs() <= allowed).all()
    assert (drawn[:, :, 0] == batch.input_ids[:, 0]).all()


def test_padding_first_tokens_and_special_tokens_stay() -> None:
    engine = ResidentEngine(tiny_model("qwen2_moe").eval())
    [batch] = text()
    often = set(range(3, 100))
    every = resampled_text(engine, [batch], 40, seed=1, forbidden=often)
    changed = 0
    for b in every:
        assert torch.equal(b.mask, batch.mask)
        assert torch.equal(b.sequence_ids, batch.sequence_ids)
        new = b.input_ids != batch.input_ids
        assert not new[:, 0].any()
        assert not new[1, 8:].any()
        assert not {int(i) for i in b.input_ids[new]} & often
        changed += int(new.sum())
    share = changed / (40 * int(batch.mask[:, 1:].sum()))
    assert share == pytest.approx(SHARE, abs=0.03)


def test_a_seed_gives_one_text_in_both_engines() -> None:
    model = tiny_model("deepseek_v3").eval()
    resident, streaming = ResidentEngine(model), StreamingEngine(LoadedLayers(model))
    a = resampled_text(resident, text(), 2, seed=7)
    b = resampled_text(streaming, text(), 2, seed=7)
    assert len(a) == len(b) == 2
    assert all(torch.equal(x.input_ids, y.input_ids) for x, y in zip(a, b, strict=True))
    assert not torch.equal(a[0].input_ids, a[1].input_ids)
    other = resampled_text(resident, text(), 2, seed=8)
    assert not torch.equal(a[0].input_ids, other[0].input_ids)
    assert resampled_text(resident, text(), 0, seed=7) == []


def test_sequences_that_judge_have_no_copies_that_teach() -> None:
    [left] = teaching(text(rows=2 * HELD_OUT))
    assert left.sequence_ids.tolist() == [0, 1, 2, 3, 5, 6, 7, 8]
    assert teaching([Batch(torch.ones(1, 3), torch.ones(1, 3), torch.tensor([4]), 0)]) == []


def test_copies_take_the_place_of_epochs() -> None:
    few = text()
    assert epochs_for(few) == epochs_for(few * 3) == 4
    assert epochs_for(few * 4) == 2
    ids = torch.zeros(1, 2**20, dtype=torch.int64)
    long = [Batch(ids, torch.ones_like(ids), torch.tensor([i]), 0) for i in range(2)]
    assert (epochs_for(long[:1]), epochs_for(long)) == (1, 1)


def test_more_text_has_fewer_copies() -> None:
    assert copies_for(100) == MOST
    assert copies_for(TOKENS // 4) == 3
    assert copies_for(TOKENS // 2) == 1
    assert copies_for(TOKENS) == copies_for(TOKENS * 5) == 0
