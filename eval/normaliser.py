"""The router after removal: over the experts that are left, or with the original's normaliser.

    python eval/normaliser.py --model eval/tiny-qwen2-moe --ratios .25 .5 .75

A softmax router without renormalisation gives an expert e^{z_e} / Σ_f e^{z_f}. Once experts have
left, the sum runs over those that stay, and every remaining weight grows. No checkpoint that stock
transformers loads can keep the old sum, so this is a measurement of what keeping it would be worth:
each token's router weights times Σ_{f kept} e^{z_f} / Σ_f e^{z_f}, by a hook. Beside it removal as
it is, and `--repair scale`: one factor a layer, which a checkpoint can hold. One choice for all.
"""

from __future__ import annotations

import argparse
import copy
from pathlib import Path
from typing import Any

import torch
from compare import Subject, parser, settings
from torch import Tensor, nn

from moe_fair.moe.blocks import find_blocks
from moe_fair.moe.surgery import cut
from moe_fair.pipelines import moe as pipeline


def main() -> None:
    """One line a ratio."""
    args = _arguments()
    subject = Subject(_grid(args), args.model, args.seed)
    base = subject.loss(subject.model)
    statistics = subject.collect([args.method])
    print("| removed | plain | original normaliser | scale |\n|---|---|---|---|")
    for ratio in args.ratios:
        plans = {}
        for kind in ("none", "scale"):
            given = {**settings(args.method), "ratio": ratio, "repair": kind}
            chosen = subject.recipe.with_settings(given)
            plans[kind] = pipeline.plan(statistics, chosen), chosen
        plan = plans["none"][0]
        kept = copy.deepcopy(subject.model)
        hooks = with_old_sum(subject.model, kept, plan.kept)
        losses = [
            subject.loss(subject.cut(*plans["none"])), subject.loss(kept),
            subject.loss(subject.cut(*plans["scale"])),
        ]  # fmt: skip
        for hook in hooks:
            hook.remove()
        shown = " | ".join(f"{x - base:.4f}" for x in losses)
        print(f"| {100 * ratio:.3g} % | {shown} |", flush=True)


def with_old_sum(original: nn.Module, pruned: nn.Module, kept: dict[str, list[int]]) -> list[Any]:
    """Cut `pruned`, and let its routers' weights be those of the original's softmax."""
    routers = {b.name: b.router.weight.detach() for b in find_blocks(original)}
    if any(getattr(b.block, "norm_topk_prob", False) for b in find_blocks(original)):
        raise SystemExit("normaliser: error: this router renormalises; there is no old sum to keep")
    cut(pruned, kept)
    hooks = []
    for block in find_blocks(pruned):

        def weigh(
            _: nn.Module, given: tuple[Tensor, Tensor, Tensor], name: str = block.name
        ) -> tuple[Tensor, Tensor, Tensor]:
            x, index, weights = given
            every = (x.float() @ routers[name].float().T).softmax(-1)
            share = every[:, torch.tensor(kept[name])].sum(-1, keepdim=True)
            return x, index, weights * share.to(weights.dtype)

        hooks.append(block.experts.register_forward_pre_hook(weigh))
    return hooks


def _grid(args: argparse.Namespace) -> argparse.Namespace:
    return parser().parse_args(["--samples", str(args.samples), "--length", str(args.length)])


def _arguments() -> argparse.Namespace:
    made = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    made.add_argument("--model", default="eval/tiny-qwen2-moe", type=lambda p: str(Path(p)))
    made.add_argument("--method", default="counterfactual-agreed/global")
    made.add_argument("--ratios", type=float, nargs="+", default=[0.25, 0.5, 0.75])
    made.add_argument("--samples", type=int, default=256)
    made.add_argument("--length", type=int, default=256)
    made.add_argument("--seed", type=int, default=0)
    return made.parse_args()


if __name__ == "__main__":
    main()
