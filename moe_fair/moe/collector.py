"""Statistics of every routed expert, from one forward + backward over the calibration set.

Each experts module is made to compute its outputs one (token, slot) a row, with its own kernel and
weight 1, so that f_e(x_t) is seen as it is; the rows are then weighted and summed exactly as the
stock forward does, and the logits stay bitwise the same (grouped_mm). The router weights pass
through an identity whose backward receives dL/d(weight) = <dL/dy_t, f_e(x_t)>; times the weight it
is the gate Taylor value t_e of that token (docs/methods.md, section 6). Everything of a batch is
booked in the backward, so that activation checkpointing, which runs the forward twice, books it
once.

Shape legend: B sequences, L tokens each, T = B·L, K top-k, S = T·K (token, slot) rows sorted by
expert, E experts, D model, G calibration domains.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from accelerate.utils import align_module_device
from torch import Tensor

from moe_fair.core.exact_sum import two_sum
from moe_fair.core.sketch import Sketch, directions
from moe_fair.core.units import Statistics, UnitGroup
from moe_fair.engines.batch import After, Batch
from moe_fair.moe.blocks import Forward, MoeBlock
from moe_fair.moe.rerouting import Candidates, Rerouting
from moe_fair.moe.segments import CELLS, dense_sums, sums, vector_sums, weight_sums

FORWARD = (
    "tokens",  # n: routed tokens
    "gate",  # Σ g
    "gate_sq",  # Σ g²
    "norm",  # Σ ‖f‖
    "norm_sq",  # Σ ‖f‖²
    "gated_norm",  # Σ g‖f‖
    "gated_norm_sq",  # Σ (g‖f‖)²
    "turned_norm",  # Σ g‖f‖ (1 - cos(x, x + y))
)
VECTORS = ("output", "output_sq")  # Σ f and Σ f², [E, D]
TAYLOR = ("taylor", "taylor_abs", "taylor_sq")  # Σ t, Σ |t|, Σ t²
# over all tokens: Σ ‖Δ_e‖², Σ δ_e and Σ δ_e δ_f ([E, E]), see `counterfactual`
GRAM = "gated_gram"  # Σ ⟨g_e f_e, g_f f_f⟩ over tokens, [E, E]


class ExpertCollector:
    """Observes the experts of a model while an engine runs it. Use as a context manager.

    Args:
        blocks: the MoE blocks to watch.
        groups: their unit groups, in the same order.
        domains: names of the calibration domains.
        taylor: also collect Taylor sums; the engine must then run the backward.
        counterfactual: also collect what each expert's removal would change, see `counterfactual`.
        u_score: also keep the distribution of each expert's gated outputs, see `core.sketch`.
        gram: also collect the Gram matrix of the experts' gated outputs, see `core.allocate.naee`.
        after: what goes on from the last hidden states, if some of the blocks are there.
    """

    def __init__(
        self,
        blocks: Sequence[MoeBlock],
        groups: Sequence[UnitGroup],
        domains: Sequence[str],
        *,
        taylor: bool = True,
        counterfactual: bool = False,
        u_score: bool = False,
        gram: bool = False,
        after: After | None = None,
    ) -> None:
        self.after = after
        self.blocks, self.groups, self.domains = list(blocks), tuple(groups), tuple(domains)
        self.taylor, self.counterfactual = taylor, counterfactual
        self.u_score, self.gram = u_score, gram
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
        names = [g.name for g in self.groups]
        return Statistics(
            groups=self.groups,
            domains=self.domains,
            sums={
                n: {k: v.cpu() for k, v in t.sums.items()}
                for n, t in zip(names, self._taps, strict=True)
            },
            constants={
                n: {k: v.cpu() for k, v in t.constants.items()}
                for n, t in zip(names, self._taps, strict=True)
            },
            rows={n: t.stacked_rows(ids) for n, t in zip(names, self._taps, strict=True)}
            if self.taylor
            else {},
            sequence_ids=torch.tensor(ids, dtype=torch.int64),
            sequence_domains=domains,
            tokens=self._tokens,
            sequences=count,
            fingerprint=dict(fingerprint or {}),
            metadata=dict(facts or {}),
            compensation={
                n: {k: v.cpu() for k, v in t.compensation.items()}
                for n, t in zip(names, self._taps, strict=True)
            },
            sketches={
                n: t.sketch for n, t in zip(names, self._taps, strict=True) if t.sketch is not None
            },
        )


class _BlockCollector:
    """Stands before one experts module and books what passes."""

    def __init__(self, collector: ExpertCollector, block: MoeBlock, domains: int) -> None:
        self.collector, self.block, self.experts = collector, block, block.experts
        self.size, self.domains = block.num_experts, domains
        self.sums: dict[str, Tensor] = {}
        self.compensation: dict[str, Tensor] = {}  # to rounding, see `exact_sum`
        self.rows: dict[int, Tensor] = {}
        self.constants: dict[str, Tensor] = {}
        self.rerouting = Rerouting(block) if collector.counterfactual else None
        self.sketch = Sketch(domains, self.size) if collector.u_score else None
        self._stock: Forward
        self._detach: Callable[[], None]

    def attach(self) -> None:
        self._stock, self._detach = self.block.attach(self.forward)
        if self.rerouting is not None:
            self.rerouting.attach()

    def detach(self) -> None:
        if self.rerouting is not None:
            self.rerouting.detach()
        self._detach()

    def forward(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        """The experts' output [T, D], as the stock forward gives it."""
        batch = self.collector.batch
        assert batch is not None, "an engine calls begin() before it runs a batch"
        batch = batch.to(hidden_states.device)  # another one where layers lie on several devices
        taylor = self.collector.taylor
        unbooked = taylor and not torch.is_grad_enabled()  # a pass whose backward comes later
        if unbooked and self._same_bits():
            return self._stock(hidden_states, top_k_index, top_k_weights)
        t, k = top_k_index.shape
        rows = hidden_states.repeat_interleave(k, dim=0)
        f = self.outputs(rows, top_k_index.flatten(), top_k_weights.flatten())
        if unbooked:
            weights, book = top_k_weights, None
        else:
            book = _BatchAccumulator(self, batch, top_k_index, f.detach(), top_k_weights.detach())
            weights = _Gate.apply(top_k_weights, book.anchor, book) if taylor else top_k_weights
        # the stock kernel's own last two steps, so that the logits stay the same bit for bit
        weighted = f * weights.flatten().unsqueeze(1)
        y = weighted.view(t, k, -1).sum(dim=1).to(hidden_states.dtype)
        if book is not None:
            book.forward(hidden_states.detach(), y.detach())
            if self.rerouting is not None:
                routes = self.rerouting.routes(top_k_index, top_k_weights.detach())
                book.reroute(
                    hidden_states.detach(),
                    f.detach(),
                    Candidates.of(top_k_index, *routes, self.size),
                )
                if taylor:
                    y.register_hook(book.output_gradient)
            if not taylor:
                book.flush()
        return y

    def outputs(self, rows: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
        """f_e(x), [R, D], of one expert [R] for each row [R, D]; see `MoeBlock.outputs`."""
        return self.block.outputs(self._stock, rows, ids, weights)

    def _same_bits(self) -> bool:
        """The stock forward sums as we do, so that it may stand in where nothing is booked."""
        config = getattr(self.experts, "config", None)
        return getattr(config, "_experts_implementation", None) == "grouped_mm"

    def add(self, domain: int, name: str, value: Tensor) -> None:
        """Add [E, ...] to this domain's sum."""
        if name not in self.sums:
            shape = (self.domains, *value.shape)
            self.sums[name] = torch.zeros(shape, dtype=torch.float64, device=value.device)
            self.compensation[name] = torch.zeros_like(self.sums[name])
        total, lost = two_sum(self.sums[name][domain], value)
        self.sums[name][domain] = total
        self.compensation[name][domain] += lost

    def weigh(self) -> None:
        """Σ|w| and Σw² of each expert's matrices, and their size, for data-free criteria."""
        if self.constants:
            return
        if next(self.experts.parameters()).is_meta:  # offloaded by accelerate: brought in for this
            with align_module_device(self.experts):
                if not next(self.experts.parameters()).is_meta:
                    self.weigh()
            return
        matrices = self.block.matrices()
        total = sum(weight_sums(p) for p in matrices)
        assert isinstance(total, Tensor)
        count = float(sum(p[0].numel() for p in matrices))
        self.constants = {
            "weight_abs": total[0],
            "weight_sq": total[1],
            "weight_count": torch.full((self.size,), count, dtype=torch.float64),
        }

    def stacked_rows(self, ids: Sequence[int]) -> Tensor:
        """[sequences, E] Taylor rows in the order of the ids."""
        return torch.stack([self.rows[i].cpu() for i in ids]) if ids else torch.zeros(0, self.size)


class _BatchAccumulator:
    """One batch at one block: sums made in the forward, entered once the gradient has come."""

    def __init__(
        self, tap: _BlockCollector, batch: Batch, top_k_index: Tensor, f: Tensor, weights: Tensor
    ) -> None:
        self.tap, self.batch, self.ids = tap, batch, top_k_index.flatten()
        self.sequence_ids = tap.collector.sequence_ids
        self.f, self.g = f, weights.flatten().double()
        self.weights_dtype = weights.dtype
        self.candidates: Candidates
        self.others: Tensor
        self.products: Tensor
        self.projected: Tensor
        self.anchor = torch.zeros((), device=f.device, requires_grad=True)
        self.sums: dict[str, Tensor] = {}
        tokens, self.k = top_k_index.shape
        self.token = torch.arange(tokens, device=f.device).repeat_interleave(self.k)
        self.counted = batch.mask.flatten()[self.token].double() if batch.padded else None

    def per_expert(self, values: dict[str, Tensor]) -> dict[str, Tensor]:
        """[S] -> [E] sums over counted rows, of each."""
        stacked = torch.stack(list(values.values()))
        if self.counted is not None:
            stacked = stacked * self.counted
        ids = self.ids.view(-1, self.k)
        return dict(zip(values, sums(stacked, ids, self.tap.size), strict=True))

    def forward(self, x: Tensor, y: Tensor) -> None:
        """All statistics that need no gradient."""
        self.tap.weigh()
        precise = torch.promote_types(self.f.dtype, torch.float32)
        norm = torch.linalg.vector_norm(self.f, dim=-1, dtype=precise).double()
        gated = self.g * norm
        xd, yd = x.double(), y.double()  # 1 - cos cancels where a layer turns little
        turn = 1 - torch.cosine_similarity(xd, xd + yd, dim=-1)
        values = {
            "tokens": torch.ones_like(norm),
            "gate": self.g,
            "gate_sq": self.g.square(),
            "norm": norm,
            "norm_sq": norm.square(),
            "gated_norm": gated,
            "gated_norm_sq": gated.square(),
            "turned_norm": gated * turn[self.token],
        }
        self.sums = self.per_expert(values)
        self.sums["output"], self.sums["output_sq"] = vector_sums(
            self.f, self.ids, self.tap.size, self.counted
        )
        if self.tap.collector.gram:
            self.sums[GRAM] = self._gram(len(x))
        if self.tap.sketch is not None:
            axes = directions(self.f.shape[-1]).to(self.f.device)
            self.projected = (self.f.to(precise) @ axes.to(precise)) * self.g.to(precise)[:, None]
        del self.f

    @torch.no_grad()
    def reroute(self, x: Tensor, f: Tensor, candidates: Candidates) -> None:
        """‖Δ_e‖² of every expert; the further candidates' outputs wait for the gradient."""
        token = candidates.tokens_of_extra()
        ids, weights = candidates.extra_ids_and_weights()
        others = self.tap.outputs(x[token], ids, weights.to(self.weights_dtype))
        self.sums["removed_error"] = self._over_tokens(
            candidates.errors(candidates.outputs(f, others))
        )
        self.candidates, self.others = candidates, others

    @torch.no_grad()
    def output_gradient(self, gradient: Tensor) -> None:
        """⟨G, f⟩ of the further candidates from G = dL/dy [T, D]; the routed ones come by the gate.

        A hook on y, so that it is there before the gate's gradient.
        """
        token = self.candidates.tokens_of_extra()
        precise = torch.promote_types(self.others.dtype, torch.float32)
        self.products = torch.linalg.vecdot(gradient[token].to(precise), self.others.to(precise))
        del self.others

    def _over_tokens(self, values: Tensor) -> Tensor:
        """[T, E] -> [E] sums over real tokens, float64."""
        if self.counted is not None:
            return self.batch.mask.flatten().to(values) @ values
        return values.sum(0)

    def _gram(self, tokens: int) -> Tensor:
        """Σ ⟨g_e f_e, g_f f_f⟩ over tokens, [E, E] float64."""
        size, width = self.tap.size, self.f.shape[-1]
        ids, g, f = (t.view(tokens, -1, *t.shape[1:]) for t in (self.ids, self.g, self.f))
        if self.counted is not None:
            g = g * self.counted.view_as(g)
        total = g.new_zeros(size * size)
        step = max(1, CELLS // (ids.shape[1] * width))
        for i in range(0, tokens, step):
            s = slice(i, i + step)
            v = f[s].double() * g[s].unsqueeze(-1)
            cell = ids[s].unsqueeze(2) * size + ids[s].unsqueeze(1)
            products = (v @ v.transpose(1, 2)).flatten()
            total += torch.bincount(cell.flatten(), weights=products, minlength=size * size)
        return total.view(size, size)

    def backward(self, gradient: Tensor) -> None:
        """Taylor sums from dL/d(weight) [T, K], then everything is entered."""
        t = gradient.flatten().double() * self.g
        self.sums |= self.per_expert(dict(zip(TAYLOR, (t, t.abs(), t.square()), strict=True)))
        for i, row in zip(self.sequence_ids, self._per_sequence(t), strict=True):
            assert i not in self.tap.rows, "a sequence was booked twice"
            self.tap.rows[i] = row
        if self.tap.rerouting is not None:
            self._second_order(gradient)
        self.flush()

    def _per_sequence(self, values: Tensor) -> Tensor:
        """[S] -> [B, E] sums over counted rows."""
        b, length = self.batch.mask.shape
        if self.counted is not None:
            values = values * self.counted
        if values.device.type != "cpu":
            each = self.ids.view(b, length, -1), values.view(b, 1, -1)
            return torch.cat([dense_sums(v, i, self.tap.size) for i, v in zip(*each, strict=True)])
        cell = self.token.div(length, rounding_mode="floor") * self.tap.size + self.ids
        return torch.bincount(cell, weights=values, minlength=b * self.tap.size).view(b, -1)

    def _second_order(self, gradient: Tensor) -> None:
        """δ_e(t) = ⟨∂ℓ/∂y_t, Δ_e(t)⟩, ℓ the summed loss of the sequence: n times the mean one."""
        candidates, k = self.candidates, gradient.shape[1]
        products = gradient.new_zeros(candidates.ids.shape, dtype=torch.float64)
        products[:, :k] = gradient.double()
        products.view(-1)[candidates.extra] = self.products.double()
        tokens = self.batch.predicted().repeat_interleave(self.batch.mask.shape[1])
        delta = candidates.first_order(products * tokens.unsqueeze(1))
        self.sums["removed_first"] = self._over_tokens(delta)
        if self.counted is not None:
            delta = delta * self.batch.mask.flatten().to(delta).unsqueeze(1)
        per_sequence = delta.view(*self.batch.mask.shape, -1).sum(1)
        self.sums["removed_first_sq"] = per_sequence.square().sum(0)
        self.sums["removed_gram"] = delta.T @ delta

    def flush(self) -> None:
        """Enter the batch's sums."""
        for name, value in self.sums.items():
            self.tap.add(self.batch.domain, name, value)
        self.sums = {}
        if self.tap.sketch is not None:
            rows, ids = self.projected.cpu(), self.ids.cpu()
            if self.counted is not None:
                real = self.counted.cpu() > 0
                rows, ids = rows[real], ids[real]
            order = torch.argsort(ids, stable=True)
            runs = torch.bincount(ids, minlength=self.tap.size).tolist()
            for e, values in enumerate(rows[order].split(runs)):
                self.tap.sketch.add(self.batch.domain, e, values)
            del self.projected


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
