"""What one decoder layer costs on this machine, timed: what a dry run's estimate is made of.

The first MoE layer's own weights are read, and the model is cut down to this one layer, with some
rows of random numbers in place of the embeddings and the output layer. What then runs on it is what
a run would run: the engines, the collector, the trials and the repair themselves, on a few tokens.

Shape legend: V vocabulary, of which `rows` are there.
"""

from __future__ import annotations

import copy
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import nn

from moe_fair.engines.batch import Batch, sequence_losses
from moe_fair.engines.layers import LayeredModel
from moe_fair.engines.loaded import LoadedLayers
from moe_fair.engines.resident import ResidentEngine
from moe_fair.engines.streaming import StreamingEngine
from moe_fair.moe.blocks import MoeBlock, find_blocks
from moe_fair.moe.choose import weight_dtype
from moe_fair.moe.collect import ExpertCollector
from moe_fair.moe.load import Checkpoint, pick_device
from moe_fair.moe.own_words import MOST, own_words
from moe_fair.moe.repair import HELD_OUT, Repairer
from moe_fair.moe.repairs import repair
from moe_fair.moe.repairs.refit import DIRECT
from moe_fair.moe.surgery import cut_block
from moe_fair.moe.trial import trial_losses
from moe_fair.moe.tune import epochs_for
from moe_fair.recipe import Recipe
from moe_fair.repairing import step_sequences

ROWS = 8192  # of embeddings and output layer
SECONDS = 2.0  # about so long may one measurement take
FIRST = 64  # tokens of the first, which sizes the others
REPAIRS = 30  # forwards that a repair of a token costs, about: to size its measurement
LARGE = 2**28  # bytes of experts above which a repair is timed on some of them


@dataclass(frozen=True)
class Line:
    """Seconds that do not depend on the tokens (or are of one step), and seconds a token."""

    fixed: float = 0.0
    token: float = 0.0


@dataclass(frozen=True)
class Costs:
    """Seconds a token and layer, where nothing else is said.

    Attributes:
        load: reading one layer's weights; `bytes` of them.
        forward: of a layer.
        learned: forward and backward with all statistics that are wanted, by the engine.
        tried: of a layer without some experts, a plan.
        head, head_learned: of the output layer: forward, with the backward.
        drawn: drawing a token's copies from the prediction.
        fit: a layer's repair without training; train: an epoch of its training, by steps.
    """

    load: float
    bytes: int
    forward: float
    learned: float
    tried: float
    head: float
    head_learned: float
    drawn: float
    fit: Line
    train: Line


def probe(
    recipe: Recipe, source: Checkpoint, engine: str, kind: str | None, kept: int, length: int
) -> Costs:
    """Read and time one layer.

    Args:
        recipe: what is collected, and how the model is run.
        engine: that gathers the statistics.
        kind: of the repair, if there is one.
        kept: experts that stay in the layer.
        length: tokens of a sequence.

    Raises:
        ValueError: layers of this model do not run alone.
    """
    device = pick_device(recipe.device)
    layered = LayeredModel(
        source.path,
        source.config,
        dtype=weight_dtype(source, recipe.dtype, device),
        device=device,
        trust_remote_code=source.trust_remote_code,
    )
    index = source.blocks[0].layer
    with layered.layer(index), _alone(layered, index) as (model, rows):
        return _Probe(recipe, source, layered, model, rows, length).costs(engine, kind, kept)


@contextmanager
def _alone(layered: LayeredModel, index: int) -> Iterator[tuple[Any, int]]:
    """The model as if this loaded layer were its only one; and how many ids it knows."""
    model, decoder = layered.model, layered.decoder
    every = decoder.layers
    rows = min(ROWS, model.config.get_text_config().vocab_size)
    setattr(decoder.holder, decoder.name, nn.ModuleList([every[index]]))
    text = {id(m): m for m in (*model.get_decoder().modules(), *model.children())}
    first, last = model.get_input_embeddings(), model.get_output_embeddings()
    draw = torch.Generator().manual_seed(0)
    try:
        for module in text.values():
            for name, p in module._parameters.items():
                if p is None or not p.is_meta:
                    continue
                shape = list(p.shape)
                if module is first or module is last:
                    shape[0] = rows
                values = torch.randn(shape, generator=draw) if p.dim() > 1 else torch.ones(shape)
                new = nn.Parameter(values.to(layered.device, p.dtype), requires_grad=False)
                module._parameters[name] = new
        if first is not None:
            first.padding_idx = None  # it may lie beyond the rows
        yield model, rows
    finally:
        setattr(decoder.holder, decoder.name, every)


class _Probe:
    """Measurements on a model of one layer."""

    def __init__(
        self,
        recipe: Recipe,
        source: Checkpoint,
        layered: LayeredModel,
        model: Any,
        rows: int,
        length: int,
    ) -> None:
        self.recipe, self.source, self.model, self.rows = recipe, source, model, rows
        self.layered, self.device, self.length = layered, layered.device, length
        self.share = model.config.get_text_config().vocab_size / rows
        self.block: MoeBlock = find_blocks(model)[0]

    def costs(self, engine: str, kind: str | None, kept: int) -> Costs:
        """All of them. What is cut for the repair comes last."""
        few = self.text(1, min(self.length, FIRST))
        rate = max(self.seconds(partial(self._forward, few)) / _tokens(few), 1e-9)
        affordable = int(SECONDS / rate / 4)
        length = max(2, min(self.length, affordable))
        batches = self.text(max(1, min(self.recipe.batch_size, affordable // length)), length)
        n = _tokens(batches)
        head, head_learned = (self.seconds(partial(self._head, batches, b)) / n for b in (0, 1))
        forward = self.seconds(partial(self._forward, batches)) / n - head
        learned = self.seconds(partial(self._learn, batches, engine))
        learned = learned / n - (head_learned if self.recipe.taylor else head)
        tried = self.seconds(partial(self._try, batches, kept)) / 2 / n - head
        drawn = self.seconds(partial(self._draw, batches)) / n - forward - head
        fit, train = self.repair(kind, kept, max(forward, 1e-9)) if kind else (Line(), Line())
        return Costs(
            load=self.layered.seconds,
            bytes=self.layered.bytes_read,
            forward=max(forward, 0.0),
            learned=max(learned, 0.0),
            tried=max(tried, 0.0),
            head=head * self.share,
            head_learned=head_learned * self.share,
            drawn=max(drawn, 0.0) * self.share,
            fit=fit,
            train=train,
        )

    def text(self, sequences: int, length: int, most: int | None = None) -> list[Batch]:
        """Sequences of random ids, in batches of at most so many."""
        draw = torch.Generator().manual_seed(1)
        ids = torch.randint(0, self.rows, (sequences, length), generator=draw)
        whole = Batch(ids, torch.ones_like(ids), torch.arange(sequences), 0)
        return [b.to(self.device) for b in whole.parts(most)]

    def seconds(self, work: Callable[[], object]) -> float:
        """How long a piece of work takes: the best of three where it is short."""
        found: list[float] = []
        while len(found) < 3 and sum(found) < SECONDS / 2:
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

    def _head(self, batches: list[Batch], backward: int) -> None:
        engine, width = self.engine(), self.model.config.get_text_config().hidden_size
        for batch in batches:
            last = torch.randn(*batch.mask.shape, width, device=self.device).to(self.layered.dtype)
            last.requires_grad_(bool(backward))
            with torch.set_grad_enabled(bool(backward)):
                for losses, weights in engine.losses_of(batch, last):
                    if backward:
                        sequence_losses(losses, weights, batch.predicted()).sum().backward()

    def _learn(self, batches: list[Batch], engine: str) -> None:
        group = replace(self.source.groups[0], name=self.block.name, layer=self.block.layer)
        collector = ExpertCollector(
            [self.block], [group], ["probe"],
            taylor=self.recipe.taylor, counterfactual=self.recipe.counterfactual,
            u_score=self.recipe.u_score, gram=self.recipe.gram,
        )  # fmt: skip
        runs = self.engine() if engine == "streaming" else ResidentEngine(self.model)
        with collector:
            runs.run(batches, collector, backward=self.recipe.taylor)

    def _try(self, batches: list[Batch], kept: int) -> None:
        gone = sorted(set(range(self.block.num_experts)) - set(_some(self.block, kept)))
        trial_losses(self.engine(), batches, [{self.block.name: gone}])

    def _draw(self, batches: list[Batch]) -> None:
        own_words(self.engine(), batches, MOST, seed=0)

    def repair(self, kind: str, kept: int, rate: float) -> tuple[Line, Line]:
        """The fit and an epoch of training, each from runs of two sizes.

        Of a large layer only some experts take part: what a token costs does not depend on their
        number, and the rest grows with it.
        """
        some = self._fewer(kept)
        share = kept / some
        length = max(4, min(self.length, int(SECONDS * 2 / rate / REPAIRS / HELD_OUT)))
        whole = length == self.length  # then steps are as large as a run's, else one a batch
        step = step_sequences(self.recipe.with_settings({"length": length})) if whole else None
        trains = bool(getattr(repair(kind), "trains", False))
        fits, trained = [], []
        for sequences in (HELD_OUT, HELD_OUT * (4 if whole else 2)):
            batches = self.text(sequences, length, step)
            n = _tokens(batches)
            fit = self.seconds(partial(self._repair, batches, "refit" if trains else kind, some))
            fits.append((n, fit))
            if trains:
                both = self.seconds(partial(self._repair, batches, kind, some))
                trained.append((n, max(0.0, both - fit) / epochs_for(batches), len(batches)))
        fit_line = _line([x[:2] for x in fits])
        if not trained:
            return replace(fit_line, fixed=fit_line.fixed * share), Line()
        if whole:
            return replace(fit_line, fixed=fit_line.fixed * share), Line(
                0.0, trained[-1][1] / trained[-1][0]
            )
        one = _line([(n / steps, seconds / steps) for n, seconds, steps in trained])
        return (
            replace(fit_line, fixed=fit_line.fixed * share),
            Line(one.fixed * share, one.token),
        )

    def _fewer(self, kept: int) -> int:
        """Leave as many experts as are needed; how many of these a repair keeps."""
        block, size = self.block, self.block.num_experts
        weights = sum(p.numel() * p.element_size() for p in block.experts.parameters())
        if weights <= LARGE:
            return kept
        width = hidden_width(block.experts)
        groups = block.n_group
        for each in range(1, size // groups):
            some = round(each * groups * kept / size) // groups * groups
            same_way = kept * width <= DIRECT or some * width > DIRECT
            if some >= block.floor() and some < each * groups and same_way:
                cut_block(block, _some(block, each * groups))
                return some
        return kept

    def _repair(self, batches: list[Batch], kind: str, kept: int) -> None:
        holder, name = self.layered.decoder.holder, self.layered.decoder.name
        layer = getattr(holder, name)
        setattr(holder, name, copy.deepcopy(layer))  # what is cut is the copy
        try:
            block = find_blocks(self.model)[0]
            Repairer(self.engine(), {block.name: _some(block, kept)}, kind).run(batches)
        finally:
            setattr(holder, name, layer)


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
