"""Packed experts of one layer in the place of their unpacked parameter, each unpacked when used.

A layer of DeepSeek-V3 takes 23 GB unpacked and half of that as it is stored. Where memory is too
short for that, its experts' parameters are tensors of this class: they have the shape and type of
the unpacked ones, and what is asked of them one expert at a time (a slice, a grouped matrix
product, a sum of squares) is computed so. Autograd keeps such a tensor for the backward as it is,
so that an expert is unpacked once more there, and the numbers are those of the layer unpacked.

Everything else that torch can do with a tensor is done to all experts unpacked.

Shape legend: E experts, S rows, D, F what a matrix takes and gives.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_map

from moe_fair.engines.packing.checkpoint import LazyWeight
from moe_fair.engines.shards import MadeTensor
from moe_fair.engines.stored_values import NAMES

aten = torch.ops.aten
# of one expert's matrix: what is done to it once it is unpacked
Step = Callable[[Tensor], Tensor]


class Matrix:
    """One expert's matrix: packed, until other values are put in its place.

    Args:
        parts: whose rows it is made of, in order.
        shape, dtype, device: of the matrix.
    """

    def __init__(
        self,
        parts: Sequence[LazyWeight],
        shape: Sequence[int],
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        self.parts, self.shape, self.dtype, self.device = parts, tuple(shape), dtype, device
        self._values: Tensor | None = None

    @staticmethod
    def plain(values: Tensor) -> Matrix:
        """One that is not packed."""
        found = Matrix((), values.shape, values.dtype, values.device)
        found._values = values
        return found

    def unpacked(self) -> Tensor:
        """Its values; not to be written into."""
        if self._values is not None:
            return self._values
        found = torch.empty(self.shape, dtype=self.dtype, device=self.device)
        for rows, part in zip(found.chunk(len(self.parts)), self.parts, strict=True):
            rows.copy_(part[:])
        return found

    def put(self, values: Tensor) -> None:
        """From now on it has these."""
        self._values = torch.empty(self.shape, dtype=self.dtype, device=self.device).copy_(values)

    def take(self, other: Matrix) -> None:
        """From now on it is what another one is now."""
        self.parts = other.parts
        self._values = None if other._values is None else other._values.clone()

    def copy(self) -> Matrix:
        """The same, which stays as it is when this one changes."""
        found = Matrix(self.parts, self.shape, self.dtype, self.device)
        found.take(self)
        return found


class PackedExperts(Tensor):
    """A tensor [E, ...] of packed matrices, or a view of it; one expert's lacks the first axis.

    Args:
        matrices: of its experts, which views share.
        like: a meta tensor of its shape, strides and data type.
        steps: what is done to each, in this order, once it is unpacked.
        one: it is of one expert alone.
    """

    matrices: list[Matrix]
    steps: tuple[Step, ...]
    one: bool
    like: Tensor
    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]

    @staticmethod
    def __new__(
        cls, matrices: Sequence[Matrix], like: Tensor, steps: Sequence[Step] = (), one: bool = False
    ) -> PackedExperts:
        found: PackedExperts = Tensor._make_wrapper_subclass(
            cls, like.shape, strides=like.stride(), dtype=like.dtype, device=matrices[0].device
        )
        found.matrices, found.like = list(matrices), like
        found.steps, found.one = tuple(steps), one
        return found

    @classmethod
    def of(cls, matrices: Sequence[Matrix]) -> PackedExperts:
        """[E, ...] of so many matrices of one shape."""
        first = matrices[0]
        shape = (len(matrices), *first.shape)
        return cls(matrices, torch.empty(shape, dtype=first.dtype, device="meta"))

    def __repr__(self, *, tensor_contents: Any = None) -> str:  # type: ignore[override]
        return f"PackedExperts({list(self.shape)}, {self.dtype}, {self.device})"

    def expert(self, place: int) -> Tensor:
        """One expert's, unpacked."""
        found = self.matrices[place].unpacked()
        for step in self.steps:
            found = step(found)
        return found

    def unpacked(self) -> Tensor:
        """All of it as a plain tensor of its own."""
        if self.one:
            found = self.expert(0)
            return found.clone() if found is self.matrices[0]._values else found
        found = torch.empty(self.shape, dtype=self.dtype, device=self.device)
        for i in range(len(self.matrices)):
            found[i] = self.expert(i)
        return found

    def held(self) -> PackedExperts:
        """The same, which stays as it is when this one is written into."""
        return PackedExperts([m.copy() for m in self.matrices], self.like, self.steps, self.one)

    def _some(self, matrices: Sequence[Matrix], like: Tensor, one: bool = False) -> PackedExperts:
        return PackedExperts(matrices, like, self.steps, one)

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls,
        func: Any,
        types: Any,
        args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        rule, kwargs = RULES.get(func), dict(kwargs or {})
        found = NotImplemented if rule is None else rule(func, *args, **kwargs)
        if found is not NotImplemented:
            return found
        assert not func._schema.is_mutable, f"{func} would write into packed experts"
        plain_args, plain_kwargs = tree_map(as_plain, (tuple(args), kwargs))
        return func(*plain_args, **plain_kwargs)


def as_plain(x: Any) -> Any:
    """Packed experts unpacked; anything else as it is."""
    return x.unpacked() if isinstance(x, PackedExperts) else x


def held(t: Tensor) -> Tensor:
    """A copy in main memory; of experts that are packed, packed where they are."""
    t = t.detach()
    return t.held() if isinstance(t, PackedExperts) else t.cpu().clone()


def mean_square(t: Tensor) -> Tensor:
    """In float32; of packed experts by one at a time."""
    if isinstance(t, PackedExperts):
        return torch.stack([mean_square(x.unpacked()) for x in t.detach()]).mean()
    return t.float().square().mean()


def as_stored(name: str, t: Tensor) -> MadeTensor:
    """A tensor in memory, to be written under a name; experts that are packed one at a time."""

    def data() -> Iterator[bytes]:
        for part in t if isinstance(t, PackedExperts) else [t]:
            plain = as_plain(part).cpu().contiguous()
            yield plain.reshape(-1).view(torch.uint8).numpy().data

    return MadeTensor(name, NAMES[t.dtype], tuple(t.shape), (), data)


def _same(_: Any, t: PackedExperts) -> Any:
    return t._some(t.matrices, t.like, t.one)


def _each(func: Any, t: PackedExperts, *args: Any, **kwargs: Any) -> Any:
    """What is done to every expert alike, and copies: when it is unpacked."""
    device = kwargs.get("device")
    if device is not None and torch.device(device) != t.device:
        return _fill(torch.empty(t.shape, dtype=kwargs.get("dtype") or t.dtype, device=device), t)
    held = t.held()
    like = func(t.like, *args, **{k: v for k, v in kwargs.items() if k != "device"})
    return PackedExperts(held.matrices, like, (*t.steps, partial(_do, func, args, kwargs)), t.one)


def _do(func: Any, args: Sequence[Any], kwargs: Mapping[str, Any], x: Tensor) -> Tensor:
    done: Tensor = func(x, *args, **kwargs)
    return done


def _times(func: Any, t: Any, factor: Any) -> Any:
    if isinstance(factor, PackedExperts):
        t, factor = factor, t
    if isinstance(factor, Tensor):
        return NotImplemented
    return _each(func, t, factor)


def _clone(func: Any, t: PackedExperts, *, memory_format: Any = None) -> Any:
    """What is asked for as a copy is meant to be written into; `contiguous` is not."""
    if memory_format is None:
        return t.unpacked()
    return _each(func, t, memory_format=memory_format)


def _transpose(func: Any, t: PackedExperts, *dims: int) -> Any:
    first, second = (d % t.dim() for d in (dims or (0, 1)))
    less = 0 if t.one else 1
    if min(first, second) < less:
        return NotImplemented
    step = partial(_do, aten.transpose.int, (first - less, second - less), {})
    return PackedExperts(t.matrices, func(t.like, *dims), (*t.steps, step), t.one)


def _view(func: Any, t: PackedExperts, shape: Sequence[int]) -> Any:
    like = func(t.like, shape)
    if not t.one and (not like.dim() or len(like) != len(t)):
        return NotImplemented
    own = like.shape if t.one else like.shape[1:]
    return PackedExperts(t.matrices, like, (*t.steps, partial(_do, func, (own,), {})), t.one)


def _select(func: Any, t: PackedExperts, dim: int, place: int) -> Any:
    if t.one or dim % t.dim():
        return NotImplemented
    return t._some([t.matrices[place]], func(t.like, dim, place), True)


def _slice(
    func: Any, t: PackedExperts, dim: int = 0, start: Any = None, end: Any = None, step: int = 1
) -> Any:
    if t.one or dim % t.dim():
        return NotImplemented
    some, like = t.matrices[slice(start, end, step)], func(t.like, dim, start, end, step)
    return t._some(some, like) if some else torch.empty_like(like, device=t.device)


def _split(func: Any, t: PackedExperts, size: int, dim: int = 0) -> Any:
    if t.one or dim % t.dim():
        return NotImplemented
    return [_slice(aten.slice.Tensor, t, 0, i, i + size) for i in range(0, len(t), size)]


def _unbind(func: Any, t: PackedExperts, dim: int = 0) -> Any:
    if t.one or dim % t.dim():
        return NotImplemented
    return [_select(aten.select.int, t, 0, i) for i in range(len(t))]


def _take(func: Any, t: PackedExperts, dim: int, ids: Tensor) -> Any:
    if t.one or dim % t.dim():
        return NotImplemented
    like = torch.empty((len(ids), *t.shape[1:]), dtype=t.dtype, device="meta")
    return t._some([t.matrices[i].copy() for i in ids.tolist()], like)


def _cat(func: Any, tensors: Sequence[Tensor], dim: int = 0) -> Any:
    """Experts that are packed beside others that are not, as when some of them are trained."""
    rows = [t for t in tensors if len(t)]
    if dim or any(isinstance(t, PackedExperts) and (t.one or t.steps) for t in rows):
        return NotImplemented
    found: list[Matrix] = []
    for t in rows:
        found += t.matrices if isinstance(t, PackedExperts) else map(Matrix.plain, t)
    return PackedExperts.of(found)


def _empty(func: Any, t: PackedExperts, **kwargs: Any) -> Tensor:
    return torch.empty(t.shape, **{"dtype": t.dtype, "device": t.device, **kwargs})


def _copy(func: Any, t: Any, source: Tensor, non_blocking: bool = False) -> Any:
    """New values for every expert, or those of packed experts into a plain tensor."""
    if not isinstance(t, PackedExperts):
        return _fill(t, source)
    assert not t.steps, "written into as it lies in the model"
    if isinstance(source, PackedExperts) and not source.steps and source.dtype == t.dtype:
        for mine, its in zip(t.matrices, source.matrices, strict=True):
            mine.take(its)
        return t
    for i, mine in enumerate(t.matrices):
        if isinstance(source, PackedExperts):
            mine.put(source.expert(i))
        else:
            mine.put(source if t.one else source[i])
    return t


def _fill(t: Tensor, source: Any) -> Tensor:
    """An expert at a time."""
    if source.one:
        return t.copy_(source.expert(0))
    for i in range(len(source)):
        t[i].copy_(source.expert(i))
    return t


def _grouped_mm(
    func: Any, x: Tensor, w: Any, offs: Tensor | None = None, *more: Any, **kwargs: Any
) -> Any:
    """[S, F] of rows [S, D] that lie expert by expert and end at `offs` [E]; w is [E, D, F]."""
    if isinstance(x, PackedExperts) or x.dim() != 2 or offs is None:
        return NotImplemented
    found = x.new_zeros(len(x), w.shape[2])
    start = 0
    for i, end in enumerate(offs.tolist()):
        if end > start:
            rows = offs.new_full((1,), end - start)
            found[start:end] = func(x[start:end], w.expert(i)[None], rows, *more, **kwargs)
        start = end
    return found


RULES: dict[Any, Callable[..., Any]] = {
    aten.detach.default: _same, aten.alias.default: _same,
    aten._to_copy.default: _each, aten.mul.Tensor: _times, aten.clone.default: _clone,
    aten.transpose.int: _transpose, aten.t.default: _transpose,
    aten.view.default: _view, aten._unsafe_view.default: _view,
    aten.select.int: _select, aten.slice.Tensor: _slice, aten.split.Tensor: _split,
    aten.unbind.int: _unbind, aten.index_select.default: _take,
    aten.cat.default: _cat, aten.empty_like.default: _empty, aten.copy_.default: _copy,
    aten._grouped_mm.default: _grouped_mm,
}  # fmt: skip
