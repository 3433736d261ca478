"""What repairs leave, asked before anything is removed: a ground to choose experts by, or none.

    python eval/repairability.py eval/tiny-qwen2-moe --calibration eval/text/calibration \
        --heldout eval/text/heldout --samples 32 -o lab/repairability.jsonl

With Φ_e the rows `g_e h_e` of an expert's hidden activations (0 for tokens that are not routed to
it, a 1 beside them where the down projection has a bias), W_e its down projection and G = ΦᵀΦ,
removing experts S with the routing as it is changes a layer's output by `Φ_S W_S`, and the ridge
regression of `--repair refit` on what stays leaves

    J(S) = min over V   ‖Φ_S W_S - Φ_R V‖² + λ‖V‖² = tr W_Sᵀ ([H_SS]⁻¹ - λI) W_S,   H = (G + λI)⁻¹

so that one pass and one inverse a layer give `RR_e = J({e}) / tr W_eᵀ G_ee W_e`, the share of
an expert's own output that repairs leave. Of a set that grows by e the inverse and the weights that
are best without it follow exactly (optimal brain surgeon, one level up):

    W ← W - H_{:e} [H_ee]⁻¹ W_e,    H ← H - H_{:e} [H_ee]⁻¹ H_{e:}

Plans, each repaired by `refit` on the same text and judged on held-out text:

- `second-order`: the default's score U (`counterfactual-agreed`), one threshold over all layers;
- `repairable`: U · RR, likewise;
- `greedy`: the layer whose cheapest expert adds least to J, J in the layer's Σ max(U, 0) / Σ raw;
- `reconstruction`: one threshold on what each expert's removal changes its layer's output by;
- `reap`, `mone`: peers, as many experts from every layer;
- `gradual`: `second-order` in two rounds on half of the text each, repaired in both.
"""

from __future__ import annotations

import argparse
import copy
import json
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

if TYPE_CHECKING:
    from moe_fair.moe.blocks import MoeBlock
    from moe_fair.moe.calibration_text import CalibrationSet

PLANS = ("second-order", "repairable", "greedy", "reconstruction", "reap", "mone", "gradual")
DAMAGE = "counterfactual-agreed"
RIDGE = 0.1  # times the mean of Σ (g h)², as refit's middle one
Kept = dict[str, list[int]]


class Elimination:
    """A layer's least squares, from which experts leave one after another.

    Args:
        gram: [E·F, E·F] float64, G.
        w: [E, F, D] the down projections.
        ridge: λ over the mean of G's diagonal.

    Attributes:
        cost: J of what has left.
        raw: [E] ‖Φ_e W_e‖² of each expert alone.
    """

    def __init__(self, gram: Tensor, w: Tensor, ridge: float = RIDGE) -> None:
        size, width, _ = w.shape
        self.weight = ridge * float(gram.diagonal().mean())
        self.width, self.w = width, w.double().clone()
        self.first = self.w.clone()
        eye = torch.eye(len(gram), dtype=torch.float64)
        self.inverse = torch.cholesky_inverse(torch.linalg.cholesky(gram + self.weight * eye))
        blocks = gram.view(size, width, size, width)
        own = torch.stack([blocks[e, :, e] for e in range(size)])
        self.raw = torch.einsum("efd,efg,egd->e", self.first, own, self.first)
        self.cost, self.left = 0.0, list(range(size))

    def adds(self) -> Tensor:
        """[E] by how much J grows where each expert leaves next; infinite for those that left."""
        found = torch.full((len(self.w),), torch.inf, dtype=torch.float64)
        for e in self.left:
            rows = slice(e * self.width, (e + 1) * self.width)
            pull = torch.linalg.solve(self.inverse[rows, rows], self.w[e])
            found[e] = (self.w[e] * pull).sum() - self.weight * self.first[e].square().sum()
        return found

    def leave(self, e: int) -> None:
        """Take an expert out."""
        rows = slice(e * self.width, (e + 1) * self.width)
        self.cost += float(self.adds()[e])
        side = self.inverse[:, rows]
        pull = torch.linalg.solve(self.inverse[rows, rows], torch.cat([self.w[e], side.T], 1))
        change = side @ pull
        depth = self.w.shape[2]
        self.w -= change[:, :depth].view_as(self.w)
        self.inverse -= change[:, depth:]
        self.left.remove(e)


def grams(model: Any, batches: Sequence[Any]) -> Iterator[tuple[MoeBlock, Tensor, Tensor]]:
    """Each block with G and its down projections [E, F, D], by one pass over the text."""
    from moe_fair.moe.block_recorder import BlockRecorder
    from moe_fair.moe.blocks import find_blocks
    from moe_fair.moe.routed_output import RoutedOutput, read_down

    blocks = find_blocks(model)
    seen: dict[str, list[tuple[Tensor, ...]]] = {b.name: [] for b in blocks}
    watches = [BlockRecorder(b) for b in blocks]
    for batch in batches:
        for watch in watches:
            watch.__enter__()
        with torch.no_grad():
            model(input_ids=batch.input_ids, attention_mask=batch.mask, use_cache=False)
        real = batch.mask.flatten().bool()
        for watch in watches:
            watch.__exit__(None, None, None)
            part = (watch.x, watch.index, watch.weights)
            seen[watch.block.name].append(tuple(t.detach()[real] for t in part))
    for block in blocks:
        x, ids, weights = (torch.cat(t) for t in zip(*seen.pop(block.name), strict=True))
        with torch.no_grad():
            yield block, RoutedOutput(block.experts, x, ids, weights).gram, read_down(block.experts)


def threshold(scores: dict[str, Tensor], floors: dict[str, int], remove: int) -> Kept:
    """The lowest scores of the whole model leave, as far as a layer's floor allows."""
    kept = {n: list(range(len(s))) for n, s in scores.items()}
    order = sorted((float(v), n, e) for n, s in scores.items() for e, v in enumerate(s))
    for _, n, e in order:
        if remove and len(kept[n]) > floors[n]:
            kept[n].remove(e)
            remove -= 1
    return kept


def greedily(
    layers: dict[str, Elimination], scores: dict[str, Tensor], floors: dict[str, int], remove: int
) -> Kept:
    """Set by set over all layers, what adds least to J in units of U."""
    unit = {n: float(scores[n].clamp(min=0).sum() / x.raw.sum()) for n, x in layers.items()}
    adds = {n: x.adds() * unit[n] for n, x in layers.items()}
    for _ in range(remove):
        open_ = [n for n, x in layers.items() if len(x.left) > floors[n]]
        n = min(open_, key=lambda m: float(adds[m].min()))
        layers[n].leave(int(adds[n].argmin()))
        adds[n] = layers[n].adds() * unit[n]
    return {n: sorted(x.left) for n, x in layers.items()}


def scored(
    model: Any, source: Any, text: CalibrationSet, batch: int, *rules: str
) -> dict[str, dict[str, Tensor]]:
    """Scores of every expert of a model in memory, by each of these criteria."""
    from dataclasses import replace

    from moe_fair.engines.resident import ResidentEngine
    from moe_fair.moe.blocks import find_blocks
    from moe_fair.moe.collector import ExpertCollector
    from moe_fair.moe.criteria import criterion
    from moe_fair.moe.statistics import collecting

    blocks = find_blocks(model)
    groups = tuple(
        replace(g, size=b.num_experts) for g, b in zip(source.groups, blocks, strict=True)
    )
    collected = collecting({n for r in rules for n in criterion(r).needs} | {"tokens"})
    with ExpertCollector(blocks, groups, text.domains, collected) as collector:
        ResidentEngine(model).run(text.batches(batch), collector)
    statistics = collector.statistics()
    return {r: dict(criterion(r)(statistics).values) for r in rules}


def evenly(scores: dict[str, Tensor], ratio: float) -> Kept:
    """The highest scores of every layer, as many of each."""
    return {
        n: sorted(s.argsort(descending=True, stable=True)[: round(len(s) * (1 - ratio))].tolist())
        for n, s in scores.items()
    }


def repaired(model: Any, kept: Kept, text: CalibrationSet, batch: int, start: Any = None) -> Any:
    """A copy of the original, cut and refitted toward it.

    Args:
        start: a model that was cut before, from whose experts the fit goes on, and what it kept.
    """
    from safetensors.torch import save_file

    from moe_fair.engines.loaded import LoadedLayers
    from moe_fair.engines.streaming import StreamingEngine
    from moe_fair.moe.blocks import find_blocks
    from moe_fair.moe.overlay import layer_file
    from moe_fair.moe.repair import Repairer

    pruned = copy.deepcopy(model)
    with tempfile.TemporaryDirectory() as work:
        if start is not None:
            before, ids = start
            for block in find_blocks(before):
                at = torch.tensor([ids[block.name].index(e) for e in kept[block.name]])
                new = {
                    f"{block.name}.{block.path(block.experts, n)}": p.detach()[at].contiguous()
                    for n, p in block.experts.named_parameters()
                }
                save_file(new, layer_file(Path(work), block))
        engine = StreamingEngine(LoadedLayers(pruned))
        Repairer(engine, kept, "refit", merged=Path(work)).run(text.batches(batch))
    return pruned


def half(text: CalibrationSet, which: int) -> CalibrationSet:
    """Every second sequence."""
    from dataclasses import replace

    return replace(text, sequences=text.sequences[which::2])


def main() -> None:
    """Measure every plan of every ratio and seed; one line each."""
    args = _parser().parse_args()
    from moe_fair.core.recipe import Recipe
    from moe_fair.engines.resident import ResidentEngine
    from moe_fair.evaluate import heldout_loss
    from moe_fair.pipelines import moe as pipeline

    args.output.parent.mkdir(parents=True, exist_ok=True)
    for seed in range(args.first, args.first + args.seeds):
        recipe = Recipe(
            model=args.model, calibration=(args.calibration,), heldout=(args.heldout,),
            samples=args.samples, heldout_samples=args.heldout_samples, length=args.length,
            batch_size=args.batch_size, seed=seed, device="cpu",
        )  # fmt: skip
        source = pipeline.open_model(recipe)
        text = pipeline.calibration_set(recipe, source, print)
        heldout = pipeline.heldout_set(recipe, source, print)
        assert heldout is not None
        model = source.load("float32", "cpu").eval()
        size = args.batch_size

        def loss(m: Any, heldout: Any = heldout, size: int = size) -> float:
            found = heldout_loss(ResidentEngine(m), heldout.batches(size), heldout.domains)
            return float(found.mean)

        base = loss(model)
        floors = {g.name: g.floor for g in source.groups}
        every = sum(g.size for g in source.groups)
        peers = [p for p in args.plans if p in ("reap", "mone", "reconstruction")]
        every_score = scored(model, source, text, size, DAMAGE, *peers)
        scores = every_score[DAMAGE]
        layers, repairable = {}, {}
        started = time.process_time()
        if {"repairable", "greedy"} & {*args.plans}:
            for block, gram, w in grams(model, text.batches(size)):
                layers[block.name] = x = Elimination(gram, w)
                share = x.adds() / x.raw.clamp(min=1e-300)
                share[x.raw <= 0] = 1.0
                repairable[block.name] = scores[block.name] * share
        print(f"one pass and inverses: {time.process_time() - started:.0f} s", flush=True)
        for ratio in args.ratios:
            remove = round(ratio * every)
            for name in args.plans:
                begun = None
                if name == "second-order":
                    kept = threshold(scores, floors, remove)
                elif name == "repairable":
                    kept = threshold(repairable, floors, remove)
                elif name == "greedy":
                    kept = greedily(copy.deepcopy(layers), scores, floors, remove)
                elif name == "reconstruction":
                    kept = threshold(every_score[name], floors, remove)
                elif name in peers:
                    kept = evenly(every_score[name], ratio)
                else:
                    early = scored(model, source, half(text, 0), size, DAMAGE)[DAMAGE]
                    first = threshold(early, floors, remove // 2)
                    begun = repaired(model, first, half(text, 0), size), first
                    again = scored(begun[0], source, half(text, 1), size, DAMAGE)[DAMAGE]
                    inner = threshold(again, floors, remove - remove // 2)
                    kept = {n: [first[n][i] for i in ids] for n, ids in inner.items()}
                used = half(text, 1) if begun is not None else text
                increase = loss(repaired(model, kept, used, size, begun)) - base
                row = {"model": Path(args.model).name, "plan": name, "ratio": ratio, "seed": seed,
                       "tokens": text.tokens, "heldout_tokens": heldout.tokens, "base": base,
                       "increase": increase, "kept": [len(k) for k in kept.values()]}  # fmt: skip
                print(f"{row['model']} seed {seed} {ratio:g} {name}: {increase:+.4f}", flush=True)
                with args.output.open("a") as f:
                    f.write(json.dumps(row) + "\n")


def _parser() -> argparse.ArgumentParser:
    made = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    made.add_argument("model")
    made.add_argument("--calibration", required=True)
    made.add_argument("--heldout", required=True)
    made.add_argument("--plans", nargs="+", choices=PLANS, default=list(PLANS))
    made.add_argument("--ratios", nargs="+", type=float, default=[0.25, 0.5])
    made.add_argument("--samples", type=int, default=32)
    made.add_argument("--heldout-samples", type=int, default=48)
    made.add_argument("--length", type=int, default=256)
    made.add_argument("--batch-size", type=int, default=8)
    made.add_argument("--first", type=int, default=0, help="the first seed")
    made.add_argument("--seeds", type=int, default=1)
    made.add_argument("-o", "--output", type=Path, required=True)
    return made


if __name__ == "__main__":
    main()
