"""Distributions of each unit's output per calibration domain, in bounded memory, and the sliced
Wasserstein distance between them.

A unit's output vectors are projected onto fixed unit directions. Per (domain, unit) the projected
values are kept as they are while there are few, then counted in bins like those of a short floating
point number: SUBS equal bins in each of the OCTAVES powers of two below the largest value seen, and
two for what is nearer to zero. When a larger value comes, the lowest octaves join the bins at zero.
What is kept depends on the set of values alone, not on their order, so that shards merge exactly;
its size does not depend on the number of tokens.

    W1(a, b) = ∫ |F_a(x) - F_b(x)| dx

is exact on values; with bins F is straight inside each. Tokens at which the unit is off (the expert
not routed) have output 0: their number follows from the domain's tokens and they cost no memory.

Shape legend: D domains, N units, P directions, n values, B bins, H binned cells.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

DIRECTIONS, SEED = 32, 0
CAPACITY = 256  # values kept as they are
OCTAVES, SUBS = 12, 16  # gates near 0 make most values small beside the largest
SIDE = OCTAVES * SUBS + 1  # bins on either side of zero
LOWEST = -126  # exponent of the smallest normal float32
NOTHING = -(2**15)  # below every exponent


def directions(size: int) -> Tensor:
    """[size, P] float32 unit vectors, the same in every run."""
    generator = torch.Generator().manual_seed(SEED)
    drawn = torch.randn(size, DIRECTIONS, generator=generator, dtype=torch.float64)
    return (drawn / drawn.norm(dim=0, keepdim=True)).float()


@dataclass(frozen=True)
class Cell:
    """The projected outputs of one unit in one domain.

    Attributes:
        count: values per direction.
        values: [P, count] float32, rising; or None where there were too many.
        bins: [P, B] int32 counts instead, B = 2 SIDE.
        top: the binned values lie below 2^top.
    """

    count: int
    values: Tensor | None = None
    bins: Tensor | None = None
    top: int = LOWEST

    @staticmethod
    def of(values: Tensor) -> Cell:
        """From [P, n] values in any order."""
        rising = Cell(values.shape[1], values.float().contiguous().sort(1).values)
        return rising if rising.count <= CAPACITY else rising.binned()

    def merge(self, other: Cell) -> Cell:
        """Both together."""
        if self.values is not None and other.values is not None:
            return Cell.of(torch.cat([self.values, other.values], 1))
        a, b = self.binned(), other.binned()
        top = max(a.top, b.top)
        a, b = a.binned(top), b.binned(top)
        assert a.bins is not None
        assert b.bins is not None
        return Cell(a.count + b.count, None, a.bins + b.bins, top)

    def binned(self, top: int | None = None) -> Cell:
        """The same in bins that reach to 2^top, by default as far as the values."""
        if self.values is None:
            assert self.bins is not None
            up = 0 if top is None else top - self.top
            return Cell(self.count, None, _coarser(self.bins, up), self.top + up)
        if top is None:
            exponent = torch.frexp(self.values).exponent[self.values != 0]
            top = int(exponent.max()) if len(exponent) else LOWEST
        place = _places(self.values, torch.tensor(top))
        bins = torch.zeros(len(place), 2 * SIDE, dtype=torch.int32)
        bins.scatter_add_(1, place, torch.ones_like(place, dtype=torch.int32))
        return Cell(self.count, None, bins, top)


def _places(values: Tensor, top: Tensor) -> Tensor:
    """The bin of each value, of bins that reach to 2^top; `top` as it broadcasts."""
    mantissa, exponent = torch.frexp(values)
    sub = ((2 * mantissa.abs() - 1) * SUBS).long()  # |mantissa| is in [1/2, 1)
    place = ((exponent.long() - (top - OCTAVES) - 1) * SUBS + sub + 1).clamp(min=0)
    place = torch.where((exponent <= top - OCTAVES) | (values == 0), 0, place)
    return torch.where(values < 0, SIDE - 1 - place, SIDE + place)


def _binned(units: Tensor, values: Tensor, size: int) -> tuple[Tensor, list[int]]:
    """[size, P, B] bins of each unit's values and their tops, in as many launches for all as one.

    Args:
        units: [n] which unit each row of the values [n, P] is of, below `size`.
    """
    exponent = torch.where(values == 0, NOTHING, torch.frexp(values).exponent).amax(1)
    tops = exponent.new_full((size,), NOTHING).scatter_reduce_(0, units, exponent, "amax")
    tops = torch.where(tops == NOTHING, LOWEST, tops)
    cells = size * DIRECTIONS
    row = units[:, None] * DIRECTIONS + torch.arange(DIRECTIONS, device=units.device)
    place = (row * (2 * SIDE) + _places(values, tops[units, None])).flatten()
    bins = torch.zeros(cells * 2 * SIDE, dtype=torch.int32, device=units.device)
    bins.scatter_add_(0, place, torch.ones_like(place, dtype=torch.int32))
    return bins.view(size, DIRECTIONS, 2 * SIDE).cpu(), tops.tolist()


def _coarser(bins: Tensor, octaves: int) -> Tensor:
    """[P, B] with the lowest octaves joined to the bins at zero."""
    if not octaves:
        return bins
    gone = min(octaves, OCTAVES) * SUBS
    new = torch.zeros_like(bins)
    below, above = bins[:, :SIDE], bins[:, SIDE:]
    new[:, gone:SIDE], new[:, SIDE : 2 * SIDE - gone] = below[:, : SIDE - gone], above[:, gone:]
    new[:, SIDE - 1] += below[:, SIDE - gone :].sum(1, dtype=torch.int32)
    new[:, SIDE] += above[:, :gone].sum(1, dtype=torch.int32)
    return new


def distance(a: Cell, b: Cell, zeros: tuple[int, int] = (0, 0)) -> Tensor:
    """[P] W1 between two cells along each direction, in float64.

    Args:
        zeros: how many further values of each are 0.
    """
    totals = (a.count + zeros[0], b.count + zeros[1])
    if a.values is not None and b.values is not None:
        return _between_values(a.values.double(), b.values.double(), zeros, totals)
    a, b = a.binned(), b.binned()
    top = max(a.top, b.top)
    at = torch.from_numpy(edges(top))
    left, right = [], []
    for cell, more, total in zip((a.binned(top), b.binned(top)), zeros, totals, strict=True):
        assert cell.bins is not None
        below = torch.cat([torch.zeros(len(cell.bins), 1), cell.bins.cumsum(1).double()], 1)
        start, end = below[:, :-1].clone(), below[:, 1:].clone()
        start[:, SIDE:] += more  # zeros lie on the edge in the middle
        end[:, SIDE:] += more
        left.append(start / total)
        right.append(end / total)
    p, q = left[0] - left[1], right[0] - right[1]
    size = p.abs() + q.abs()
    crossing = (p * p + q * q) / (2 * size).clamp(min=1e-300)
    mean = torch.where(p * q < 0, crossing, size / 2)
    return mean @ at.diff()


def _between_values(
    a: Tensor, b: Tensor, zeros: tuple[int, int], totals: tuple[int, int]
) -> Tensor:
    at = torch.cat([a, b, a.new_zeros(len(a), 1)], 1).sort(1).values
    f = [
        (torch.searchsorted(v, at, right=True) + more * (at >= 0)).double() / total
        for v, more, total in zip((a, b), zeros, totals, strict=True)
    ]
    return ((f[0] - f[1]).abs()[:, :-1] * at.diff(dim=1)).sum(1)


def edges(top: int) -> np.ndarray:
    """[B + 1] borders of the bins."""
    octaves = np.exp2(np.arange(top - OCTAVES, top, dtype=np.float64))
    side = (octaves[:, None] * (1 + np.arange(SUBS) / SUBS)).ravel()
    side = np.append(side, np.exp2(float(top)))
    return np.concatenate([-side[::-1], [0.0], side])


class Sketch:
    """The cells of one group's units over the calibration domains.

    Args:
        domains, units: how many of each.
    """

    def __init__(self, domains: int, units: int) -> None:
        self.domains, self.units = domains, units
        self.cells: dict[tuple[int, int], Cell] = {}

    def add(self, domain: int, units: Tensor, values: Tensor) -> None:
        """Enter projected outputs [n, P], each of one of the units [n], on any device.

        Raises:
            ValueError: NaN or Inf among them.
        """
        if not bool(torch.isfinite(values).all()):
            raise ValueError("the calibration run met NaN or Inf in an expert's output")
        values, here = values.float(), units.cpu()
        counts = torch.bincount(here, minlength=self.units)
        known = torch.tensor([self._count(domain, u) for u in range(self.units)])
        many = (counts > 0) & (counts + known > CAPACITY)
        if not bool(many.any()):
            values = values.cpu()
        for binned, its in ((False, (counts > 0) & ~many), (True, many)):
            numbers = its.nonzero().flatten().tolist()
            if not numbers:
                continue
            rows = its[here].nonzero().flatten()
            rows = rows[here[rows].argsort(stable=True)].to(values.device)
            if binned:
                place = (its.cumsum(0) - 1).to(units.device)[units[rows]]
                bins, tops = _binned(place, values[rows], len(numbers))
                cells = [
                    Cell(int(counts[u]), None, b, t)
                    for u, b, t in zip(numbers, bins, tops, strict=True)
                ]
            else:
                each = values[rows].cpu().split(counts[its].tolist())
                cells = [Cell.of(v.T) for v in each]
            for unit, cell in zip(numbers, cells, strict=True):
                self._enter((domain, unit), cell)

    def _count(self, domain: int, unit: int) -> int:
        cell = self.cells.get((domain, unit))
        return 0 if cell is None else cell.count

    def _enter(self, key: tuple[int, int], cell: Cell) -> None:
        if cell.count:
            self.cells[key] = self.cells[key].merge(cell) if key in self.cells else cell

    def merge(self, other: Sketch) -> Sketch:
        """Both shards of the data together."""
        both = Sketch(self.domains, self.units)
        for key in sorted(self.cells.keys() | other.cells.keys()):
            for part in (self, other):
                if key in part.cells:
                    both._enter(key, part.cells[key])
        return both

    def scores(self, tokens: Tensor) -> Tensor:
        """[N] the U-Score: largest over pairs of domains of the mean W1 over the directions.

        Args:
            tokens: [D] of each domain; those without any are left out.
        """
        present = [d for d in range(self.domains) if tokens[d] > 0]
        nothing = Cell(0, torch.zeros(DIRECTIONS, 0))
        result = torch.zeros(self.units, dtype=torch.float64)
        for unit in range(self.units):
            cells = {d: self.cells.get((d, unit), nothing) for d in present}
            off = {d: int(tokens[d]) - cells[d].count for d in present}
            for i, d in enumerate(present):
                for e in present[i + 1 :]:
                    apart = distance(cells[d], cells[e], (off[d], off[e])).mean()
                    result[unit] = max(result[unit], apart)
        return result

    def pack(self) -> dict[str, Tensor]:
        """As tensors: the same cells give the same bytes."""
        counts = torch.zeros(self.domains, self.units, dtype=torch.int64)
        tops = torch.full((self.domains, self.units), LOWEST, dtype=torch.int64)
        values, bins = [torch.zeros(DIRECTIONS, 0)], []
        for key in sorted(self.cells):
            cell = self.cells[key]
            counts[key] = cell.count
            if cell.values is not None:
                values.append(cell.values)
            else:
                assert cell.bins is not None
                tops[key] = cell.top
                bins.append(cell.bins)
        none = torch.zeros(0, DIRECTIONS, 2 * SIDE, dtype=torch.int32)
        return {
            "counts": counts,
            "tops": tops,
            "values": torch.cat(values, 1),
            "bins": torch.stack(bins) if bins else none,
        }

    @staticmethod
    def unpack(tensors: Mapping[str, Tensor]) -> Sketch:
        """From what `pack` gives."""
        counts = tensors["counts"]
        sketch = Sketch(*counts.shape)
        at = number = 0
        for domain, unit in counts.nonzero().tolist():
            n = int(counts[domain, unit])
            if n <= CAPACITY:
                cell = Cell(n, tensors["values"][:, at : at + n].contiguous())
                at += n
            else:
                top = int(tensors["tops"][domain, unit])
                cell = Cell(n, None, tensors["bins"][number], top)
                number += 1
            sketch.cells[domain, unit] = cell
        return sketch
