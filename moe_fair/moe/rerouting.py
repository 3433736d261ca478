"""What a layer's output would be without one of its experts: exact, for every expert and token.

Removing expert e sends its tokens to the next best expert and lets the router weigh again. The
model's own router says how: its linear map runs once, then its remaining code runs again for every
e with that logit at minus infinity (and the correction bias, where there is one; a table of token
ids names e's substitute instead), so that softmax over all or the best experts, sigmoid, bias and
group limits are all what the model does. The counterfactual output is a sum over *candidates*, the
experts that any of these routings picks: where groups do not limit the choice, the top k + 1.

    y₋ₑ(t) = Σ_i c_ei(t) f_i(x_t),    Δ_e = y₋ₑ − y

Shape legend: T tokens, E experts, R removals, K top-k, M candidates of a token (K routed, then the
others), D model.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from operator import itemgetter
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils.hooks import RemovableHandle

from moe_fair.moe import token_table
from moe_fair.moe.blocks import MoeBlock

PROJECTIONS = {"linear", "matmul", "mm", "addmm", "einsum", "__matmul__"}
CELLS = 2**24  # elements of one chunk of tokens on a device
WIDENED = 2**21  # of them on a CPU, where they are float64
ROUTED = 2**24  # logits of the cases that are routed at once


class Rerouting:
    """One router's choices with an expert removed. Attach, run the model, then ask.

    Raises:
        ValueError: (on asking) the router's code is not understood; names what was looked for.
    """

    def __init__(self, block: MoeBlock) -> None:
        self.block, self.router = block, block.router
        self._stock: Callable[..., Any] | None = None
        self._call: tuple[tuple[Any, ...], dict[str, Any]] = ((), {})
        self._logits: Tensor | None = None
        self._number = 0
        self._output: Any = None
        self._read: Callable[[Any], tuple[Tensor, Tensor]] | None = None
        self._rows_are_free: bool | None = None

    def attach(self) -> None:
        """Note what passes through the router from now on."""
        self._stock = self.router.forward
        self.router.forward = self._forward

    def detach(self) -> None:
        """Leave the router as it was."""
        self._restore(self._stock)
        self._logits = self._output = None
        self._call = ((), {})

    def _restore(self, stock: Callable[..., Any] | None) -> None:
        del self.router.forward
        if self.router.forward != stock:  # accelerate had put a hook on the instance
            self.router.forward = stock  # type: ignore[assignment]

    @contextmanager
    def hiding(self, gone: Sequence[int]) -> Iterator[None]:
        """Inside, the router runs as if these experts were not there: on logits of -inf."""
        stock = self.router.forward

        def forward(*args: Any, **kwargs: Any) -> Any:
            with _Hide(self.block.num_experts, gone):
                return stock(*args, **kwargs)

        self.router.forward = forward
        try:
            with self._without_bias(gone), token_table.without(self.block, gone):
                yield
        finally:
            self._restore(stock)

    def _forward(self, *args: Any, **kwargs: Any) -> Any:
        assert self._stock is not None
        with _Listen(self.block.num_experts) as listen:
            self._output = self._stock(*args, **kwargs)
        self._logits, self._number, self._call = listen.logits, listen.number, (args, kwargs)
        return self._output

    @torch.no_grad()
    def routes(
        self, index: Tensor, weights: Tensor, sets: Sequence[Sequence[int]] | None = None
    ) -> tuple[Tensor, Tensor]:
        """The choice with nothing removed, then with each expert (or set of experts) removed.

        Args:
            index, weights: [T, K], what the experts were called with.
            sets: sets of experts that leave together; None: each expert alone.

        Returns:
            ids [1 + R, T, K] int64 and weights [1 + R, T, K], in float32 at least, for R removals.
        """
        assert self._stock is not None
        read = self._reader(index, weights)
        assert self._logits is not None
        logits = self._logits.to(torch.promote_types(self._logits.dtype, torch.float32))
        removals = [[e] for e in range(self.block.num_experts)] if sets is None else sets
        every = [[], *map(list, removals)]
        if self._together(read, index, logits):
            step = max(1, ROUTED // logits.numel())
            parts = [every[i : i + step] for i in range(0, len(every), step)]
        else:
            parts = [[gone] for gone in every]
        found = [self._without(part, logits, read, index, weights) for part in parts]
        ids, values = (torch.cat(t) for t in zip(*found, strict=True))
        return ids, values

    def _without(
        self,
        cases: Sequence[list[int]],
        logits: Tensor,
        read: Callable[[Any], tuple[Tensor, Tensor]],
        index: Tensor,
        weights: Tensor,
    ) -> tuple[Tensor, Tensor]:
        """Ids and weights [R, T, K] with each of these sets removed; several as further rows."""
        assert self._stock is not None
        args, kwargs = self._call
        hidden = logits.repeat(len(cases), *[1] * (logits.dim() - 1))
        if any(cases):
            rows = [r for r, case in enumerate(cases) for _ in case]
            gone = torch.zeros(len(cases), self.block.num_experts, dtype=torch.bool)
            gone[rows, [e for case in cases for e in case]] = True
            gone = gone.to(hidden.device).repeat_interleave(len(hidden) // len(cases), 0)
            hidden.masked_fill_(
                gone.view(-1, *[1] * (logits.dim() - 2), gone.shape[-1]), -torch.inf
            )
        alone = cases[0] if len(cases) == 1 else []
        with (
            token_table.without(self.block, alone),  # first: it has linear maps of its own
            self._without_bias(alone),
            _Answer(hidden, self._number),
        ):
            case_ids, case_weights = read(self._stock(*args, **kwargs))
        shape = (len(cases), *index.shape)
        return case_ids.view(shape), case_weights.view(shape).to(logits.dtype)

    def _together(self, read: Callable[[Any], Any], index: Tensor, logits: Tensor) -> bool:
        """The router's code takes the logits of several cases as further tokens; tried once.

        Not where experts have a bias or a table of tokens as well, which each case changes.
        """
        if self._rows_are_free is None:
            self._rows_are_free = False
            if self.block.table is None and not self._biases():
                self._rows_are_free = self._twice(read, index, logits)
        return self._rows_are_free

    def _twice(self, read: Callable[[Any], Any], index: Tensor, logits: Tensor) -> bool:
        """Both halves of the logits, given twice, are routed as the model routed them."""
        assert self._stock is not None
        args, kwargs = self._call
        try:
            with _Answer(logits.repeat(2, *[1] * (logits.dim() - 1)), self._number):
                output = self._stock(*args, **kwargs)
            ids = read(output)[0].view(2, *index.shape)
        except (RuntimeError, ValueError, IndexError):  # it goes by the shape of its input
            return False
        return bool((ids == index).all())

    def _biases(self) -> list[Tensor]:
        return [getattr(m, t) for m, t, _ in self.block.routed if "bias" in t]

    def _reader(self, index: Tensor, weights: Tensor) -> Callable[[Any], tuple[Tensor, Tensor]]:
        """What takes the ids and weights that reach the experts out of the router's output."""
        if not bool(torch.isfinite(weights).all()):
            raise ValueError(
                f"{self.block.name}: the calibration run met NaN or Inf in the layers before it; "
                "look for a bad weight there, or use --dtype float32 where a type overflows"
            )
        if self._read is not None:
            return self._read
        self._read = self._find_reader(index, weights)
        return self._read

    def _find_reader(
        self, index: Tensor, weights: Tensor
    ) -> Callable[[Any], tuple[Tensor, Tensor]]:
        found = self.block.chosen(self._output)
        if found is not None:
            assert _same(found[0], index)
            assert _same(found[1], weights)
            return self.block.chosen  # type: ignore[return-value]
        output = self._output if isinstance(self._output, tuple) else ()
        ids = [i for i, t in enumerate(output) if _same(t, index)]
        values = [i for i, t in enumerate(output) if _same(t, weights)]
        if self._logits is None or not ids or not values:
            missing = "its linear map" if self._logits is None else "what it hands to the experts"
            raise ValueError(
                f"{self.block.name}: routing without an expert cannot be found, since {missing} "
                f"was not recognised in {type(self.router).__name__}; choose a --method that needs "
                "no counterfactual (taylor-sq, fair, reap), or calibrate with --for one"
            )
        return itemgetter(ids[0], values[0])

    @contextmanager
    def _without_bias(self, gone: Sequence[int]) -> Iterator[None]:
        """The choice is also biased: sigmoid(-inf) + bias could still win."""
        biases = self._biases()
        if any(b.is_meta for b in biases):
            raise ValueError(
                f"{self.block.name}: the router's bias is offloaded, and routing without an expert "
                "cannot be found there; give the router a device, or use --engine streaming"
            )
        saved = [b.detach().clone() for b in biases]
        try:
            for b in biases:
                b.data.view(-1)[list(gone)] = -torch.inf
            yield
        finally:
            for b, s in zip(biases, saved, strict=True):
                b.data.copy_(s)


class RouterLogits:
    """What a router's linear map gives to every expert. Attach, run the model, then ask."""

    def __init__(self, block: MoeBlock) -> None:
        self.block = block
        self._listen: _Listen
        self._handles: list[RemovableHandle] = []

    def attach(self) -> None:
        """Listen to what passes through the router from now on."""
        router = self.block.router
        self._handles = [
            router.register_forward_pre_hook(self._begin),
            router.register_forward_hook(self._end, always_call=True),
        ]

    def detach(self) -> None:
        """Leave the router as it was."""
        for handle in self._handles:
            handle.remove()

    def logits(self, tokens: int) -> Tensor:
        """[T, E] of the last run, which was of so many tokens.

        Raises:
            ValueError: the router's code is not understood.
        """
        found, size = self._listen.logits, self.block.num_experts
        if found is None or found.numel() != tokens * size:
            raise ValueError(
                f"{self.block.name}: the linear map of {type(self.block.router).__name__} was not "
                "recognised, and experts are not compared by it; use --reduce merge"
            )
        return found.reshape(tokens, size)

    def _begin(self, *_: Any) -> None:
        self._listen = _Listen(self.block.num_experts)
        self._listen.__enter__()

    def _end(self, *_: Any) -> None:
        self._listen.__exit__(None, None, None)


def _same(t: Any, other: Tensor) -> bool:
    if not isinstance(t, Tensor) or t.numel() != other.numel():
        return False
    if t.is_floating_point() != other.is_floating_point():
        return False
    return torch.equal(t.detach().reshape(other.shape).to(other.dtype), other.detach())


class _Listen(TorchFunctionMode):
    """Keeps the first result of a linear map onto the experts, and which map that was."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.size, self.number = size, 0
        self.logits: Tensor | None = None

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if self.logits is None and _is_projection(func):
            if result.dim() >= 2 and result.shape[-1] == self.size:
                self.logits = result.detach()
            else:
                self.number += 1
        return result


class _Hide(TorchFunctionMode):
    """Minus infinity for some experts in the first result of a linear map onto all of them."""

    def __init__(self, size: int, gone: Sequence[int]) -> None:
        super().__init__()
        self.size, self.gone = size, list(gone)
        self.done = False

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if self.done or not _is_projection(func) or result.dim() < 2:
            return result
        if result.shape[-1] != self.size:
            return result
        self.done = True
        hidden = result.clone()
        hidden[..., self.gone] = -torch.inf
        return hidden


class _Answer(TorchFunctionMode):
    """Gives these logits in place of one of the linear maps."""

    def __init__(self, logits: Tensor, number: int) -> None:
        super().__init__()
        self.logits, self.number = logits, number

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if _is_projection(func):
            self.number -= 1
            if self.number == -1:
                return self.logits
        return func(*args, **(kwargs or {}))


def _is_projection(func: Any) -> bool:
    return getattr(func, "__name__", "") in PROJECTIONS


@dataclass(frozen=True)
class Candidates:
    """The experts that can have a say in a token's output, and their weights in every case.

    Attributes:
        ids: [T, M] expert ids, the K routed first; -1 where a token has fewer candidates.
        change: [T, R, M] c_r − g: how each candidate's weight changes in removal r (by default of
            each expert alone, so that R = E).
        extra: [R] flat positions in `ids` of the candidates that are not routed.
    """

    ids: Tensor
    change: Tensor
    extra: Tensor

    @staticmethod
    def of(index: Tensor, ids: Tensor, weights: Tensor, size: int) -> Candidates:
        """From the routed ids [T, K] and `Rerouting.routes` of a block of `size` experts."""
        cases, tokens, k = ids.shape
        chosen = torch.zeros(tokens, size, dtype=torch.bool, device=ids.device)
        chosen.scatter_(1, ids[1:].transpose(0, 1).flatten(1), True)
        chosen.scatter_(1, index, False)
        most = int(chosen.sum(1).max())
        others = torch.where(chosen, torch.arange(size, device=ids.device), size)
        others = others.sort(1).values[:, :most]
        all_ids = torch.cat([index, others.masked_fill(others == size, -1)], 1)
        place = torch.zeros(tokens, size + 1, dtype=torch.int64, device=ids.device)
        slots = torch.arange(k + most, device=ids.device).expand(tokens, -1)
        place.scatter_(1, all_ids.masked_fill(all_ids < 0, size), slots)
        dense = weights.new_zeros(cases, tokens, k + most)
        dense.scatter_add_(2, place.expand(cases, -1, -1).gather(2, ids), weights)
        change = (dense[1:] - dense[:1]).transpose(0, 1).contiguous()
        extra = (all_ids[:, k:] >= 0).nonzero()
        return Candidates(all_ids, change, extra[:, 0] * (k + most) + k + extra[:, 1])

    def outputs(self, routed: Tensor, others: Tensor) -> Tensor:
        """[T, M, D] candidates' outputs from those of the routed [T·K, D] and the extra [R, D]."""
        tokens, m = self.ids.shape
        k = routed.shape[0] // tokens
        f = routed.new_zeros(tokens, m, routed.shape[-1])
        f[:, :k] = routed.view(tokens, k, -1)
        f.view(tokens * m, -1)[self.extra] = others.to(f.dtype)
        return f

    def tokens_of_extra(self) -> Tensor:
        """[R] token of each extra candidate."""
        return self.extra.div(self.ids.shape[1], rounding_mode="floor")

    def extra_ids_and_weights(self) -> tuple[Tensor, Tensor]:
        """[R] expert of each extra candidate, and its largest weight in any of the cases."""
        return self.ids.flatten()[self.extra], self.change.amax(1).flatten()[self.extra]

    def chunks(self, width: int) -> Iterator[slice]:
        """Tokens in runs whose [tokens, M, width] and [tokens, R, M] fit a fixed memory."""
        tokens, removals, m = self.change.shape
        cells = WIDENED if self.change.device.type == "cpu" else CELLS
        step = max(1, cells // (m * max(width, removals)))
        for start in range(0, tokens, step):
            yield slice(start, min(start + step, tokens))

    def errors(self, f: Tensor) -> Tensor:
        """[T, R] ‖Δ_r‖² in float64, from the candidates' outputs [T, M, D].

        Their products are float64 on a CPU; other devices can be slow at it, and float32 leaves
        of a sum of D products more digits than the outputs have.
        """
        precise = torch.promote_types(f.dtype, torch.float32)
        wide = torch.float64 if f.device.type == "cpu" else precise
        parts = []
        for s in self.chunks(f.shape[-1]):
            fd, c = f[s].to(wide), self.change[s].double()
            gram = (fd @ fd.transpose(1, 2)).double()
            parts.append(((c @ gram) * c).sum(-1).clamp_(min=0))
        return torch.cat(parts)

    def first_order(self, products: Tensor) -> Tensor:
        """[T, R] ⟨G, Δ_r⟩ in float64, from the candidates' ⟨G, f_i⟩ [T, M]."""
        parts = [
            (self.change[s].double() @ products[s].double().unsqueeze(-1)).squeeze(-1)
            for s in self.chunks(1)
        ]
        return torch.cat(parts)
