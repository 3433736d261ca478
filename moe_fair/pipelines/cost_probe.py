"""What one decoder layer costs on this machine, timed: what a dry run's estimate is made of.

The first MoE layer's own weights are read, and the model is cut down to this one layer, with some
rows of random numbers in place of the embeddings and the output layer. What then runs on it is what
a run would run: the engines, the collector, the trials and the repair themselves, on a few tokens.

Shape legend: V vocabulary, of which `rows` are there.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from moe_fair.core.recipe import Recipe
from moe_fair.engines.batch import Batch, sequence_losses
from moe_fair.engines.device import pick_device
from moe_fair.engines.layer_calls import LayerCall
from moe_fair.engines.layers import LayeredModel
from moe_fair.engines.loaded import LoadedLayers
from moe_fair.engines.one_layer import alone
from moe_fair.engines.resident import ResidentEngine
from moe_fair.engines.streaming import StreamingEngine
from moe_fair.moe.block_recorder import BlockRecorder
from moe_fair.moe.blocks import MoeBlock, find_blocks
from moe_fair.moe.checkpoint_source import Checkpoint
from moe_fair.moe.collector import ExpertCollector
from moe_fair.moe.engine_choice import weight_dtype
from moe_fair.moe.judging import HELD_OUT, judges
from moe_fair.moe.layer_distillation import distill_layer
from moe_fair.moe.layer_examples import Kinds, LayerExamples
from moe_fair.moe.repairs import Repair, repair
from moe_fair.moe.repairs.refit import DIRECT
from moe_fair.moe.resampled_text import MOST, resampled_text
from moe_fair.moe.routed_output import RoutedOutput
from moe_fair.moe.statistics import Collected
from moe_fair.moe.surgery import cut_block
from moe_fair.moe.trial import trial_losses
from moe_fair.pipelines.repair import step_sequences

SECONDS = 1.5  # about so long may one measurement take
FIRST = 64  # tokens of the first, which sizes the others
FITTED = 8  # forwards that a fit at one strength costs, about: to size its measurement
LARGE = 2**28  # bytes of experts above which a repair is timed on some of them


@dataclass(frozen=True)
class Line:
    """Seconds a batch (or step, or layer) that do not depend on its tokens, and seconds a token."""

    fixed: float = 0.0
    token: float = 0.0

    def at(self, tokens: float, times: float) -> float:
        """Seconds of so many tokens in so many batches."""
        return times * self.fixed + tokens * self.token


@dataclass(frozen=True)
class Costs:
    """What was measured, of one layer where nothing else is said.

    Attributes:
        load: seconds to read it; `bytes` of weights.
        forward: a batch through it.
        learned: forward and backward with all statistics that are wanted, by the engine.
        tried: without some experts, a plan.
        fit: its repair without training, by layers; train: an epoch of training, by steps.
        head, head_learned, drawn: seconds a token of the output layer: forward, with the backward,
            and drawing copies from its prediction.
    """

    load: float
    bytes: int
    forward: Line
    learned: Line
    tried: Line
    fit: Line
    train: Line
    head: float
    head_learned: float
    drawn: float


def probe(
    recipe: Recipe,
    collected: Collected,
    source: Checkpoint,
    engine: str,
    kind: str | None,
    kept: int,
    length: int,
) -> Costs:
    """Read and time one layer.

    Args:
        recipe: how the model is run; collected: what is.
        engine: that gathers the statistics.
        kind: of the repair, if there is one.
        kept: experts that stay in the layer.
        length: tokens of a sequence.

    Raises:
        ValueError, RuntimeError: layers of this model do not run alone, or not on this machine.
    """
    device = pick_device(recipe.device)
    layered = LayeredModel(
        source.path,
        source.config,
        dtype=weight_dtype(source, recipe.dtype, device),
        device=device,
        trust_remote_code=source.trust_remote_code,
        packing=source.packing,
    )
    index = source.blocks[0].layer
    with layered.layer(index), alone(layered, index) as (model, rows):
        return _Probe(recipe, collected, source, layered, model, rows, length).costs(
            engine, kind, kept
        )


class _Probe:
    """Measurements on a model of one layer.

    Of a large layer only some experts take part: what a token costs does not depend on their
    number, and the rest grows with it.
    """

    def __init__(
        self,
        recipe: Recipe,
        collected: Collected,
        source: Checkpoint,
        layered: LayeredModel,
        model: Any,
        rows: int,
        length: int,
    ) -> None:
        self.recipe, self.source, self.model, self.rows = recipe, source, model, rows
        self.collected = collected
        self.layered, self.device, self.length = layered, layered.device, length
        self.share = model.config.get_text_config().vocab_size / rows
        self.block: MoeBlock = find_blocks(model)[0]
        self.layer: nn.Module = layered.decoder.layers[0]

    def costs(self, engine: str, kind: str | None, kept: int) -> Costs:
        """All of them."""
        size = self.block.num_experts
        some = self._fewer(kept)
        scale = size / self.block.num_experts
        few = self.text(1, min(self.length, FIRST))
        rate = max(self.seconds(partial(self._forward, few)) / _tokens(few), 1e-9)
        affordable = max(8, int(SECONDS / rate / 4))
        length = min(self.length, affordable)
        sequences = max(1, min(self.recipe.batch_size, affordable // length))
        small = self.text(1, length) if sequences > 1 else self.text(1, length // 4)
        large = self.text(sequences, length)

        def line(work: Callable[[list[Batch]], object], less: float, streams: int = 1) -> Line:
            points = []
            for b in (small, large):
                m = float(_tokens(b))
                points.append((m, max(0.0, self.seconds(partial(work, b)) / streams - less * m)))
            found = _line(points)
            return replace(found, fixed=found.fixed * scale)

        n = _tokens(large)
        head = self.seconds(partial(self._head, large, False)) / n
        head_learned = self.seconds(partial(self._head, large, True)) / n
        forward = line(self._forward, head)
        through = self.seconds(partial(self._forward, large))
        drawn = max(0.0, self.seconds(partial(self._draw, large)) - through) / n
        less = head_learned if self.collected.backward else head
        learned = line(partial(self._learn, engine), less)
        tried = line(partial(self._try, some), head, 2)
        fit, train = self.repair(kind, some, max(forward.token, 1e-9)) if kind else (Line(), Line())
        return Costs(
            load=self.layered.seconds,
            bytes=self.layered.bytes_read,
            forward=forward,
            learned=learned,
            tried=tried,
            fit=self._fits(kind, fit, kept / some) if kind else fit,
            train=replace(train, fixed=train.fixed * kept / some),
            head=head * self.share,
            head_learned=head_learned * self.share,
            drawn=drawn * self.share,
        )

    def text(self, sequences: int, length: int, most: int | None = None) -> list[Batch]:
        """Sequences of random ids, in batches of at most so many."""
        draw = torch.Generator().manual_seed(1)
        ids = torch.randint(0, self.rows, (sequences, length), generator=draw)
        whole = Batch(ids, torch.ones_like(ids), torch.arange(sequences), 0)
        return [b.to(self.device) for b in whole.parts(most)]

    def seconds(
        self, work: Callable[[], object], before: Callable[[], object] = lambda: None
    ) -> float:
        """How long a piece of work takes: the best of three where it is short."""
        found: list[float] = []
        while len(found) < 3 and sum(found) < SECONDS / 2:
            before()
            started = time.perf_counter()
            work()
            if self.device.type != "cpu":
                torch.accelerator.synchronize(self.device)
            found.append(time.perf_counter() - started)
        return min(found)

    def engine(self) -> StreamingEngine:
        """Over the one layer."""
        layers = LoadedLayers(self.model)
        layers.device = self.device  # of other towers' weights there are none
        return StreamingEngine(layers)

    def _forward(self, batches: list[Batch]) -> None:
        for _ in self.engine().losses(batches):
            pass

    def _head(self, batches: list[Batch], backward: bool) -> None:
        engine, width = self.engine(), self.model.config.get_text_config().hidden_size
        for batch in batches:
            last = torch.randn(*batch.mask.shape, width, device=self.device).to(self.layered.dtype)
            last.requires_grad_(backward)
            with torch.set_grad_enabled(backward):
                for losses, weights in engine.losses_of(batch, last):
                    if backward:
                        sequence_losses(losses, weights, batch.predicted()).sum().backward()

    def _learn(self, engine: str, batches: list[Batch]) -> None:
        group = replace(self.source.groups[0], name=self.block.name, layer=self.block.layer)
        collector = ExpertCollector([self.block], [group], ["probe"], self.collected)
        runs = self.engine() if engine == "streaming" else ResidentEngine(self.model)
        with collector:
            runs.run(batches, collector, backward=self.collected.backward)

    def _try(self, kept: int, batches: list[Batch]) -> None:
        gone = sorted(set(range(self.block.num_experts)) - set(_some(self.block, kept)))
        trial_losses(self.engine(), batches, [{self.block.name: gone}])

    def _draw(self, batches: list[Batch]) -> None:
        resampled_text(self.engine(), batches, MOST, seed=0)

    def repair(self, kind: str, kept: int, rate: float) -> tuple[Line, Line]:
        """A fit at one strength, and an epoch of training, each from two sizes of text."""
        rule = repair(kind)
        affordable = int(SECONDS * 2 / rate / FITTED)
        whole = affordable >= HELD_OUT * self.length  # then steps are as large as a run's
        length = self.length if whole else max(2, FIRST // 2 // HELD_OUT)
        more = 4 if whole else max(4, affordable // (length * HELD_OUT))
        step = step_sequences(self.recipe.with_settings({"length": length})) if whole else None
        cut_block(self.block, _some(self.block, kept))
        fits, trained = [], []
        for sequences in (HELD_OUT, HELD_OUT * more):
            batches = self.text(sequences, length, step)
            n = float(_tokens(batches))
            calls, hidden = self.engine().embed(batches)
            first = [row[0] for row in calls]
            fits.append((n, self.seconds(partial(self._fit, rule, first, hidden))))
            if getattr(rule, "trains", False):
                work = partial(self._train, batches, first, hidden)
                trained.append((n, self.seconds(work)))
        if whole and trained:
            n, seconds = trained[-1]
            return _line(fits), Line(0.0, seconds / n)
        return _line(fits), _line(trained) if trained else Line()

    @torch.no_grad()
    def _fit(self, rule: Repair, calls: list[LayerCall], hidden: list[Tensor]) -> None:
        watch, parts = BlockRecorder(self.block), []
        with watch:
            for call, x in zip(calls, hidden, strict=True):
                call.run(self.layer, x)
                parts.append((watch.x, watch.index, watch.weights, watch.y))
        x, ids, weights, y = (torch.cat(t) for t in zip(*parts, strict=True))
        target = (y + torch.randn_like(y)).to(torch.promote_types(y.dtype, torch.float32))
        rule.fit(RoutedOutput(self.block.experts, x, ids, weights), target, rule.ridges[-1])

    @torch.no_grad()
    def _train(self, batches: list[Batch], calls: list[LayerCall], hidden: list[Tensor]) -> None:
        targets = [c.run(self.layer, x) * 1.01 for c, x in zip(calls, hidden, strict=True)]
        kinds = Kinds(batches, judges, self.device)
        examples = LayerExamples(self.layer, calls, kinds, hidden, targets)
        distill_layer(examples, self.block, epochs=1, look=False)

    def _fits(self, kind: str, one: Line, scale: float) -> Line:
        """What a layer takes: every strength on what teaches, the best one on all."""
        strengths = len(repair(kind).ridges)
        taught = strengths * (HELD_OUT - 1) / HELD_OUT
        return Line(one.fixed * scale * (strengths + 1), one.token * (taught + 1))

    def _fewer(self, kept: int) -> int:
        """Leave as many experts as are needed; how many of these a plan keeps."""
        block, size = self.block, self.block.num_experts
        weights = sum(p.numel() * p.element_size() for p in block.experts.parameters())
        if weights <= LARGE:
            return kept
        width, groups = hidden_width(block.experts), block.n_group
        for count in range(2 * block.floor(), size, groups):
            some = round(count * kept / size) // groups * groups
            same_way = kept * width <= DIRECT or some * width > DIRECT
            if count > some >= block.floor() and same_way:
                cut_block(block, _some(block, count))
                return some
        return kept


def hidden_width(experts: Any) -> int:
    """F: rows of an expert's down projection, one more with a bias."""
    shape = experts.down_proj.shape
    return int(shape[1] if experts.is_transposed else shape[2]) + int(experts.has_bias)


def _some(block: MoeBlock, count: int) -> list[int]:
    """So many experts, as many of each of the router's groups."""
    run, each = block.num_experts // block.n_group, count // block.n_group
    return [g * run + i for g in range(block.n_group) for i in range(each)]


def _tokens(batches: list[Batch]) -> int:
    return sum(int(b.mask.sum()) for b in batches)


def _line(points: list[tuple[float, float]]) -> Line:
    """Fixed seconds and seconds a token, neither below zero, through two measurements."""
    (n, first), (m, second) = points
    token = (second - first) / (m - n)
    if token <= 0:
        return Line(0.0, second / m)
    return Line(max(0.0, first - token * n), token if first > token * n else second / m)
