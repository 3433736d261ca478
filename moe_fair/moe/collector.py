"""Statistics of every routed expert, from one forward + backward over the calibration set.

Each experts module is made to compute its outputs one (token, slot) a row, with its own kernel and
weight 1, so that f_e(x_t) is seen as it is; the rows are then weighted and summed exactly as the
stock forward does, and the logits stay bitwise the same (grouped_mm). The router weights pass
through an identity whose backward receives dL/d(weight) = <dL/dy_t, f_e(x_t)>. What is made of all
this is up to the families of `moe.statistics`. Everything of a batch is booked in the backward, so
that activation checkpointing, which runs the forward twice, books it once.

Shape legend: B sequences, T tokens, K top-k, S = T·K (token, slot) rows, E experts, D model,
P directions of a sketch.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from accelerate.utils import align_module_device
from torch import Tensor

from moe_fair.core.exact_sum import add_exactly
from moe_fair.core.sketch import DIRECTIONS, Sketch
from moe_fair.core.units import Statistics, UnitGroup
from moe_fair.engines.batch import After, Batch
from moe_fair.moe.blocks import Forward, MoeBlock
from moe_fair.moe.statistic import Family, Pass, check_shape
from moe_fair.moe.statistics import Collected, offered, usual


class ExpertCollector:
    """Observes the experts of a model while an engine runs it. Use as a context manager.

    Args:
        blocks: the MoE blocks to watch.
        groups: their unit groups, in the same order.
        domains: names of the calibration domains.
        collected: what to collect; with a backward the engine must run it.
        after: what goes on from the last hidden states, if some of the blocks are there.
    """

    def __init__(
        self,
        blocks: Sequence[MoeBlock],
        groups: Sequence[UnitGroup],
        domains: Sequence[str],
        collected: Collected | None = None,
        *,
        after: After | None = None,
    ) -> None:
        self.after = after
        self.blocks, self.groups, self.domains = list(blocks), tuple(groups), tuple(domains)
        self.collected = usual() if collected is None else collected
        self.batch: Batch | None = None
        self.sequence_ids: list[int] = []  # of the batch
        self._taps = [_BlockCollector(self, b, len(self.domains)) for b in self.blocks]
        self._tokens = torch.zeros(len(domains), dtype=torch.float64)
        self._sequences: dict[int, int] = {}

    def __enter__(self) -> ExpertCollector:
        for tap in self._taps:
            tap.attach()
        return self

    def __exit__(self, *exception: object) -> None:
        for tap in self._taps:
            tap.detach()

    def begin(self, batch: Batch) -> None:
        """The next forward runs this batch. A streaming engine comes back to a batch per layer."""
        self.batch = batch
        self.sequence_ids = batch.sequence_ids.tolist()
        if self.sequence_ids[0] not in self._sequences:
            self._tokens[batch.domain] += float(batch.mask.sum())
            self._sequences.update(dict.fromkeys(self.sequence_ids, batch.domain))

    def statistics(
        self, fingerprint: Mapping[str, str] | None = None, facts: Mapping[str, Any] | None = None
    ) -> Statistics:
        """Everything booked so far."""
        ids = sorted(self._sequences)
        domains = torch.tensor([self._sequences[i] for i in ids], dtype=torch.int64)
        count = torch.bincount(domains, minlength=len(self.domains)).to(torch.float64)
        taps = {g.name: t for g, t in zip(self.groups, self._taps, strict=True)}
        return Statistics(
            groups=self.groups,
            domains=self.domains,
            sums={n: _on_cpu(t.sums) for n, t in taps.items()},
            constants={n: _on_cpu(t.constants) for n, t in taps.items()},
            rows={n: t.stacked_rows(ids) for n, t in taps.items()}
            if any(s.kind == "row" for s in self.collected.statistics().values())
            else {},
            sequence_ids=torch.tensor(ids, dtype=torch.int64),
            sequence_domains=domains,
            tokens=self._tokens,
            sequences=count,
            fingerprint=dict(fingerprint or {}),
            metadata=dict(facts or {}),
            compensation={n: _on_cpu(t.compensation) for n, t in taps.items()},
            sketches={n: t.sketch for n, t in taps.items() if t.sketch is not None},
        )


def _on_cpu(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The same in main memory; a device is waited for once for each type of number."""
    found = dict(tensors)
    away = {k: v for k, v in tensors.items() if v.device.type != "cpu"}
    for dtype in dict.fromkeys(v.dtype for v in away.values()):
        its = {k: v for k, v in away.items() if v.dtype == dtype}
        together = torch.cat([v.flatten() for v in its.values()]).cpu()
        parts = together.split([v.numel() for v in its.values()])
        found |= {k: p.reshape(its[k].shape).clone() for k, p in zip(its, parts, strict=True)}
    return found


class _BlockCollector:
    """Stands before one experts module and books what passes."""

    def __init__(self, collector: ExpertCollector, block: MoeBlock, domains: int) -> None:
        # no cycle: what lies on a device goes with the collector
        self.collector: ExpertCollector = weakref.proxy(collector)
        self.block, self.experts = block, block.experts
        self.size, self.domains = block.num_experts, domains
        self.families = list(collector.collected.families())
        self.statistics = collector.collected.statistics()
        self.sums: dict[str, Tensor] = {}
        self.compensation: dict[str, Tensor] = {}  # to rounding, see `exact_sum`
        self.rows: dict[int, Tensor] = {}
        self.constants: dict[str, Tensor] = {}
        self.watched = {f.name: watch(block) for f, watch in offered(self.families, "watch")}
        sketched = any(s.kind == "sketch" for s in self.statistics.values())
        self.sketch = Sketch(domains, self.size) if sketched else None
        self._stock: Forward
        self._detach: Callable[[], None]

    def attach(self) -> None:
        self._stock, self._detach = self.block.attach(self.forward)
        for watcher in self.watched.values():
            watcher.attach()

    def detach(self) -> None:
        for watcher in self.watched.values():
            watcher.detach()
        self._detach()

    def forward(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        """The experts' output [T, D], as the stock forward gives it."""
        batch = self.collector.batch
        assert batch is not None, "an engine calls begin() before it runs a batch"
        batch = batch.to(hidden_states.device)  # another one where layers lie on several devices
        backward = self.collector.collected.backward
        unbooked = backward and not torch.is_grad_enabled()  # a pass whose backward comes later
        if unbooked and self._same_bits():
            return self._stock(hidden_states, top_k_index, top_k_weights)
        t, k = top_k_index.shape
        rows = hidden_states.repeat_interleave(k, dim=0)
        f = self.outputs(rows, top_k_index.flatten(), top_k_weights.flatten())
        if unbooked:
            weights, book = top_k_weights, None
        else:
            book = _BatchAccumulator(self, batch, top_k_index, top_k_weights.detach())
            weights = _Gate.apply(top_k_weights, book.anchor, book) if backward else top_k_weights
        # the stock kernel's own last two steps, so that the logits stay the same bit for bit
        weighted = f * weights.flatten().unsqueeze(1)
        y = weighted.view(t, k, -1).sum(dim=1).to(hidden_states.dtype)
        if book is not None:
            book.forward(hidden_states.detach(), f.detach(), y.detach())
            if not backward:
                book.flush()
            elif offered(self.families, "output_gradient"):
                y.register_hook(book.output_gradient)
        return y

    def outputs(self, rows: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
        """f_e(x), [R, D], of one expert [R] for each row [R, D]; see `MoeBlock.outputs`."""
        return self.block.outputs(self._stock, rows, ids, weights)

    def _same_bits(self) -> bool:
        """The stock forward sums as we do, so that it may stand in where nothing is booked."""
        config = getattr(self.experts, "config", None)
        return getattr(config, "_experts_implementation", None) == "grouped_mm"

    def add(self, domain: int, values: Mapping[str, Tensor]) -> None:
        """Add [E, ...] each to this domain's sum."""
        for name, value in values.items():
            if name not in self.sums:
                shape = (self.domains, *value.shape)
                self.sums[name] = torch.zeros(shape, dtype=torch.float64, device=value.device)
                self.compensation[name] = torch.zeros_like(self.sums[name])
        add_exactly(
            [self.sums[n][domain] for n in values],
            [self.compensation[n][domain] for n in values],
            [v.double() for v in values.values()],
        )

    def weigh(self) -> None:
        """The constants, once the weights are there."""
        known = offered(self.families, "constants")
        if self.constants or not known:
            return
        if next(self.experts.parameters()).is_meta:  # offloaded by accelerate: brought in for this
            with align_module_device(self.experts):
                if not next(self.experts.parameters()).is_meta:
                    self.weigh()
            return
        for _, constants in known:
            self.constants |= constants(self.block)

    def stacked_rows(self, ids: Sequence[int]) -> Tensor:
        """[sequences, E] rows in the order of the ids."""
        return torch.stack([self.rows[i].cpu() for i in ids]) if ids else torch.zeros(0, self.size)


class _BatchAccumulator:
    """One batch at one block: shares made in the forward, entered once the gradient has come."""

    def __init__(
        self, tap: _BlockCollector, batch: Batch, top_k_index: Tensor, weights: Tensor
    ) -> None:
        self.tap, self.batch = tap, batch
        self.sequence_ids = tap.collector.sequence_ids
        self.anchor = torch.zeros((), device=top_k_index.device, requires_grad=True)
        self.values: dict[str, Tensor] = {}
        self.seen = Pass(
            tap.block,
            batch,
            top_k_index,
            weights,
            backward=tap.collector.collected.backward,
            outputs=tap.outputs,
            watched=tap.watched,
        )

    @torch.no_grad()
    def forward(self, x: Tensor, f: Tensor, y: Tensor) -> None:
        """All statistics that need no gradient."""
        self.tap.weigh()
        self.seen.x, self.seen.f, self.seen.y = x, f, y
        for family, accumulate in offered(self.tap.families, "accumulate"):
            self._take(family, accumulate(self.seen))
        del self.seen.x, self.seen.f, self.seen.y  # what is needed later was kept

    @torch.no_grad()
    def output_gradient(self, gradient: Tensor) -> None:
        """dL/dy [T, D], by a hook on y: it is there before the gate's gradient."""
        for _, output_gradient in offered(self.tap.families, "output_gradient"):
            output_gradient(self.seen, gradient)

    def backward(self, gradient: Tensor) -> None:
        """The rest, from dL/d(weight) [T, K], then everything is entered."""
        self.seen.gradient = gradient
        for family, backward in offered(self.tap.families, "backward"):
            self._take(family, backward(self.seen))
        self.flush()

    def _take(self, family: Family, values: Mapping[str, Tensor]) -> None:
        """A family's share of the batch."""
        sizes = {
            "E": self.tap.size, "B": len(self.batch.mask), "S": len(self.seen.ids),
            "P": DIRECTIONS,
        }  # fmt: skip
        known = {n: s for n, s in family.names.items() if n in self.tap.statistics}
        for name, value in values.items():
            check_shape(family.name, name, value, known.get(name), sizes)
        self.values |= values

    def flush(self) -> None:
        """Enter the batch's share."""
        sums: dict[str, Tensor] = {}
        for name, value in self.values.items():
            kind = self.tap.statistics[name].kind
            if kind == "row":
                self._enter_rows(value)
            elif kind == "sketch":
                self._enter_outputs(value)
            else:
                sums[name] = value
        self.tap.add(self.batch.domain, sums)
        self.values = {}

    def _enter_rows(self, rows: Tensor) -> None:
        """[B, E]."""
        for i, row in zip(self.sequence_ids, rows, strict=True):
            assert i not in self.tap.rows, "a sequence was booked twice"
            self.tap.rows[i] = row

    def _enter_outputs(self, rows: Tensor) -> None:
        """[S, P] into the distributions of each expert."""
        assert self.tap.sketch is not None
        ids = self.seen.ids
        if self.seen.counted is not None:
            real = self.seen.counted > 0
            rows, ids = rows[real], ids[real]
        self.tap.sketch.add(self.batch.domain, ids, rows)


class _Gate(torch.autograd.Function):
    """Identity on the router weights; its backward hands the gradient to the booking.

    The anchor makes the output differentiable even in the first layer, where nothing else is.
    """

    @staticmethod
    def forward(ctx: Any, weights: Tensor, anchor: Tensor, book: _BatchAccumulator) -> Tensor:
        ctx.book = book
        return weights.view_as(weights)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
        ctx.book.backward(gradient)
        return gradient, None, None
