"""Every fused family of transformers: calibrated, cut, saved, loaded, generating.

The families are the registry's, so a new one in transformers is met here at once; those that do not
work yet are listed with their reason, and a test says when a reason no longer holds.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from masking import masked
from tiny import fused_families, tiny_model
from transformers import AutoModelForCausalLM

from moe_fair.core.units import Statistics
from moe_fair.engines.batch import Batch
from moe_fair.engines.layers import LayeredModel
from moe_fair.engines.resident import ResidentEngine
from moe_fair.engines.streaming import StreamingEngine
from moe_fair.moe.blocks import MoeBlock, find_blocks
from moe_fair.moe.checkpoint import write_model
from moe_fair.moe.collect import ExpertCollector
from moe_fair.moe.load import Checkpoint
from moe_fair.moe.surgery import cut

pytestmark = pytest.mark.slow  # about 60 s

# served and tested; the rest of the registry comes with its own files and tests
SERVED = [
    "qwen2_moe", "qwen3_moe", "mixtral", "olmoe", "deepseek_v2", "deepseek_v3", "gpt_oss",
    "phimoe", "granitemoe", "glm4_moe", "ernie4_5_moe", "jamba", "qwen3_next", "hunyuan_v1_moe",
    "minimax_m2", "lfm2_moe", "dots1", "flex_olmo",
]  # fmt: skip


@pytest.fixture(scope="module", params=SERVED)
def checkpoint(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Any:
    folder = tmp_path_factory.mktemp(request.param)
    tiny_model(request.param).save_pretrained(folder)
    return Checkpoint(str(folder))


def original(checkpoint: Checkpoint) -> Any:
    return AutoModelForCausalLM.from_pretrained(checkpoint.path, dtype=torch.float32).eval()


def batches() -> list[Batch]:
    """Two unequal batches; one has padding."""
    g = torch.Generator().manual_seed(3)
    ids = torch.randint(3, 128, (3, 24), generator=g)
    mask = torch.ones_like(ids)
    mask[1, 15:] = 0
    first = Batch(ids, mask, torch.arange(3), 0)
    return [first, Batch(ids[:2, :9], mask[:2, :9], torch.arange(3, 5), 1)]


def collect(checkpoint: Checkpoint, model: Any, engine: Any) -> Statistics:
    collector = ExpertCollector(find_blocks(model), checkpoint.groups, ("a", "b"))
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


def test_streaming_statistics_are_the_resident_ones(checkpoint: Checkpoint) -> None:
    model = original(checkpoint)
    resident = collect(checkpoint, model, ResidentEngine(model))
    layered = LayeredModel(
        checkpoint.path, checkpoint.config, dtype=torch.float32, device=torch.device("cpu")
    )
    streaming = collect(
        checkpoint, layered.model, StreamingEngine(layered, activation_bytes=20_000)
    )
    for group in resident.groups:
        assert torch.equal(resident.rows[group.name], streaming.rows[group.name])
        for name, value in resident.sums[group.name].items():
            assert torch.equal(value, streaming.sums[group.name][name]), (group.name, name)
        assert resident.sums[group.name]["tokens"].sum() > 0
        assert resident.rows[group.name].abs().sum() > 0


@pytest.mark.parametrize("uniform", [True, False], ids=["uniform", "unequal"])
def test_cut_saved_and_loaded(checkpoint: Checkpoint, tmp_path: Path, uniform: bool) -> None:
    kept = {b.name: some(b, i, uniform) for i, b in enumerate(checkpoint.blocks)}
    write_model(checkpoint, kept, tmp_path / "out")
    loaded, info = AutoModelForCausalLM.from_pretrained(
        tmp_path / "out",
        dtype=torch.float32,
        trust_remote_code=None if uniform else True,
        output_loading_info=True,
    )
    loaded.eval()
    assert not any(info.values()), info
    reference = original(checkpoint)
    cut(reference, kept)
    a, b = reference.state_dict(), loaded.state_dict()
    assert a.keys() == b.keys()
    assert all(torch.equal(a[k], b[k]) for k in a)

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
    prompt = batch.input_ids[:1, :6]
    texts = [
        loaded.generate(
            prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=5, do_sample=False,
            use_cache=cache,
        ).tolist()
        for cache in (True, False)
    ]  # fmt: skip
    assert texts[0] == texts[1]


def test_the_registry_holds_what_is_served() -> None:
    assert set(SERVED) <= set(fused_families())
