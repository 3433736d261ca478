"""Plans tried after a cheap repair: the losses of models that are cut, fitted and run for real."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from flow import batches, original, removals, summed
from tiny import tiny_model
from torch import Tensor

from moe_fair.engines.batch import Batch
from moe_fair.engines.layers import LayeredModel
from moe_fair.engines.loaded import LoadedLayers
from moe_fair.engines.streaming import StreamingEngine
from moe_fair.moe.block_recorder import BlockRecorder
from moe_fair.moe.blocks import find_blocks
from moe_fair.moe.checkpoint_source import Checkpoint
from moe_fair.moe.repaired_trial import RIDGE, SWEEPS, repaired_losses
from moe_fair.moe.repairs import refit
from moe_fair.moe.routed_output import RoutedOutput, write_down
from moe_fair.moe.surgery import cut_block

pytestmark = pytest.mark.slow

# a shared expert; biases; groups and a bias of the choice; a factor, and a norm, behind the block
KINDS = ["qwen2_moe", "gpt_oss", "deepseek_v3", "granitemoe", "flex_olmo"]


def teaching() -> list[Batch]:
    g = torch.Generator().manual_seed(9)
    ids = torch.randint(3, 128, (6, 20), generator=g)
    mask = torch.ones_like(ids)
    mask[2, 11:] = 0
    return [
        Batch(ids[:4], mask[:4], torch.arange(4), 0),
        Batch(ids[4:], mask[4:], torch.arange(2), 1),
    ]


def run(model: Any, text: list[Batch], layer: Any, watch: BlockRecorder) -> list[Tensor]:
    """Of every real token what goes into the experts, what they give, and the layer's output."""
    rows: list[list[Tensor]] = []
    outs: list[Tensor] = []
    hook = layer.register_forward_hook(
        lambda _, __, out: outs.append(out[0] if isinstance(out, tuple) else out)
    )
    for b in text:
        with watch, torch.no_grad():
            model(b.input_ids, attention_mask=b.mask, use_cache=False)
        real = b.mask.flatten().bool()
        seen = (watch.x, watch.index, watch.weights, watch.y, outs.pop().flatten(0, 1))
        rows.append([t[real] for t in seen])
    hook.remove()
    return [torch.cat(t) for t in zip(*rows, strict=True)]


def cut_and_fitted(model: Any, plan: dict[str, list[int]]) -> Any:
    """The model cut for real, layer by layer, each fitted to the original's and written."""
    cut = copy.deepcopy(model)
    for was, block in zip(find_blocks(model), find_blocks(cut), strict=True):
        gone = plan[block.name]
        one, other = model.model.layers[was.layer], cut.model.layers[block.layer]
        *_, routed, wanted = run(model, teaching(), one, BlockRecorder(was))
        cut_block(block, [e for e in range(was.num_experts) if e not in gone])
        x, ids, weights, y, out = run(cut, teaching(), other, BlockRecorder(block))
        target = (wanted - out) / getattr(model.config, "residual_multiplier", 1.0) + y
        if model.config.model_type == "flex_olmo":
            target = routed
        part = RoutedOutput(block.experts, x, ids, weights)
        [(_, w)] = refit.path(part, target, [RIDGE], direct=0, sweeps=SWEEPS)
        write_down(block.experts, w)
    return cut


@pytest.mark.parametrize("kind", KINDS)
def test_losses_are_those_of_models_that_are_cut_and_fitted(kind: str, tmp_path: Any) -> None:
    tiny_model(kind).save_pretrained(tmp_path)
    source = Checkpoint(str(tmp_path))
    model = original(source)
    before = {n: p.clone() for n, p in model.named_parameters()}
    plans = [removals(source, True), removals(source, False)]
    engine = StreamingEngine(LoadedLayers(model))
    found, counts = repaired_losses(engine, teaching(), batches(), plans)
    wanted = [summed(model), *(summed(cut_and_fitted(model, plan)) for plan in plans)]
    torch.testing.assert_close(found, torch.stack(wanted), rtol=2e-5, atol=2e-5)
    assert counts.tolist() == [23, 14, 23, 8, 8]
    assert all(torch.equal(p, before[n]) for n, p in model.named_parameters())

    layered = LayeredModel(
        source.path, source.config, dtype=torch.float32, device=torch.device("cpu")
    )
    streamed, _ = repaired_losses(StreamingEngine(layered), teaching(), batches(), plans)
    assert torch.equal(streamed, found)
    alone, _ = repaired_losses(engine, teaching(), batches()[1:], plans[1:], keep=False)
    torch.testing.assert_close(alone, found[[0, 2], 3:], rtol=1e-6, atol=1e-6)
