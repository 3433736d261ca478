"""The output without an expert equals that of the model whose router really has it removed."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from collected import families
from masking import masked
from tiny import tiny_model
from torch import Tensor

from moe_fair.engines.batch import Batch
from moe_fair.engines.resident import ResidentEngine
from moe_fair.moe.blocks import MoeBlock, find_blocks
from moe_fair.moe.collector import ExpertCollector
from moe_fair.moe.rerouting import Candidates, Rerouting

# softmax over all; top-k renormalised; sigmoid with bias and groups; softmax with groups; a bias in
# the router; sigmoid with bias, no groups; scaled; a router of two masked softmaxes
KINDS = [
    "qwen2_moe", "mixtral", "deepseek_v3", "deepseek_v2", "gpt_oss", "lfm2_moe", "ernie4_5_moe",
    "granitemoe", "jamba", "phimoe",
]  # fmt: skip


class Call:
    """What the experts of a block were called with, and what they gave."""

    def __init__(self, block: MoeBlock) -> None:
        self.block, self.stock = block, block.experts.forward

    def __enter__(self) -> Call:
        self.block.experts.forward = self.forward
        return self

    def __exit__(self, *exception: object) -> None:
        del self.block.experts.forward

    def forward(self, x: Tensor, index: Tensor, weights: Tensor) -> Tensor:
        self.x, self.index, self.weights = x, index, weights
        self.y = self.stock(x, index, weights)
        return self.y


def model_in_float64(kind: str) -> Any:
    torch.manual_seed(0)
    model = tiny_model(kind).double().eval()
    model.set_experts_implementation("eager")  # the grouped kernel has no float64
    with torch.no_grad():  # routing that differs from token to token
        for block in find_blocks(model):
            for module, name, _ in block.routed:
                t = getattr(module, name)
                t.copy_(torch.randn_like(t) * (0.1 if "bias" in name else 1.0))
    return model


@pytest.mark.parametrize("kind", KINDS)
def test_equals_the_layer_with_the_expert_removed(kind: str) -> None:
    model = model_in_float64(kind)
    ids = torch.randint(0, model.config.vocab_size, (3, 20))
    block = find_blocks(model)[-1]
    rerouting = Rerouting(block)
    rerouting.attach()
    with torch.no_grad(), Call(block) as call:
        model(input_ids=ids, use_cache=False)
        routes = rerouting.routes(call.index, call.weights)
    rerouting.detach()
    found = Candidates.of(call.index, *routes, block.num_experts)
    assert found.ids.shape[1] <= block.num_experts
    # phimoe's second choice depends on the first; ernie adds its bias after the softmax
    if block.n_group == 1 and kind not in ("phimoe", "ernie4_5_moe"):
        assert found.ids.shape[1] == block.top_k + 1
    every = torch.stack(
        [
            block.experts(
                call.x, torch.full((len(call.x), 1), e), call.weights.new_ones(len(call.x), 1)
            )
            for e in range(block.num_experts)
        ],
        1,
    )  # [T, E, D]
    f = every.gather(1, found.ids.clamp(min=0).unsqueeze(-1).expand(-1, -1, every.shape[-1]))
    delta = found.change.double() @ f  # [T, E, D]
    errors = found.errors(f)
    others = f.flatten(0, 1)[found.extra]
    k = call.index.shape[1]
    padded = f * (found.ids >= 0).unsqueeze(-1)
    assert torch.equal(found.outputs(f[:, :k].reshape(-1, f.shape[-1]), others), padded)
    for e in range(block.num_experts):
        kept = [i for i in range(block.num_experts) if i != e]
        with torch.no_grad(), masked(model, {block.name: kept}), Call(block) as without:
            model(input_ids=ids, use_cache=False)
        assert not (without.index == e).any()
        scale = call.y.abs().max()
        assert (call.y + delta[:, e] - without.y).abs().max() <= 1e-6 * scale
        exact = (without.y - call.y).square().sum(-1)
        torch.testing.assert_close(errors[:, e], exact, rtol=1e-5, atol=1e-9 * float(scale) ** 2)


@pytest.mark.parametrize("kind", ["qwen2_moe", "mixtral", "deepseek_v3"])
def test_sums_equal_a_loop_over_experts_and_tokens(kind: str) -> None:
    model = model_in_float64(kind).float()
    ids = torch.randint(0, model.config.vocab_size, (3, 12))
    mask = torch.ones_like(ids)
    mask[1, 7:] = 0
    batch = Batch(ids, mask, torch.arange(3), 0)
    block = find_blocks(model)[-1]
    group = block.unit_group(4)
    wanted = families("counterfactual")
    with ExpertCollector([block], [group], ["text"], wanted) as collector:
        ResidentEngine(model).run([batch], collector)
    sums = {k: v[0] for k, v in collector.statistics().sums[group.name].items()}

    # gradient of each sequence's SUMMED loss with respect to the routed output, by autograd alone
    with Call(block) as call:
        stock = call.forward

        def keep_gradient(*given: Tensor) -> Tensor:
            y = stock(*given)
            y.requires_grad_(True)
            y.retain_grad()
            call.y = y
            return y

        block.experts.forward = keep_gradient
        logits = model(input_ids=ids, attention_mask=mask, use_cache=False).logits
        losses = torch.nn.functional.cross_entropy(
            logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten(), reduction="none"
        ).view(3, -1)
        (losses * mask[:, 1:]).sum().backward()
    y, gradient = call.y.detach(), call.y.grad
    assert gradient is not None
    real = mask.flatten().bool()
    every = []
    for e in range(block.num_experts):
        kept = [i for i in range(block.num_experts) if i != e]
        with torch.no_grad(), masked(model, {block.name: kept}), Call(block) as without:
            model(input_ids=ids, attention_mask=mask, use_cache=False)
        delta = (without.y - y).double()[real]
        first = (gradient.double()[real] * delta).sum(-1)
        by_sequence = torch.zeros(len(ids), dtype=torch.float64)
        by_sequence.index_add_(0, torch.arange(len(ids)).repeat_interleave(mask.sum(1)), first)
        want = {
            "removed_error": delta.square().sum(),
            "removed_first": first.sum(),
            "removed_first_sq": by_sequence.square().sum(),
            "removed_half_sq": sum(  # of the sequences whose id is even
                first.split(mask.sum(1).tolist())[i].square().sum()
                for i, n in enumerate(batch.sequence_ids.tolist())
                if n % 2 == 0
            ),
        }
        for name, value in want.items():
            scale = float(sums[name].abs().max())
            assert abs(float(sums[name][e] - value)) <= 2e-5 * scale, (name, e)
        every.append(first)
    delta = torch.stack(every)
    scale = float(sums["removed_gram"].abs().max())
    torch.testing.assert_close(sums["removed_gram"], delta @ delta.T, rtol=0, atol=2e-5 * scale)
