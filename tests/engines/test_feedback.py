"""Rounding by inputs, against the textbook's slow form and by what it is for."""

from __future__ import annotations

import torch
from torch import Tensor

from moe_fair.engines.packing.feedback import BLOCK, DAMPING, counts, rounded

LOW, HIGH = -8, 7


def _problem(columns: int, rows: int = 6) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    g = torch.Generator().manual_seed(columns)
    mix = torch.randn(columns, columns, generator=g).double()
    h = torch.randn(4 * columns, columns, generator=g).double() @ mix
    w = torch.randn(rows, columns, generator=g)
    scale = (w.abs().amax(1, keepdim=True) / 7.3).expand_as(w)
    return w, h.T @ h, scale, torch.zeros_like(w)


def _nearest(w: Tensor, scale: Tensor, zero: Tensor) -> Tensor:
    return ((w / scale + zero).round().clamp(LOW, HIGH) - zero) * scale


def _error(w: Tensor, near: Tensor, gram: Tensor) -> float:
    off = (near - w).double()
    return float(((off @ gram) * off).sum())


def test_as_by_the_inverse_of_what_is_left() -> None:
    """Optimal brain surgeon, a column at a time: the rest moves along the inverse's column."""
    for columns in (20, BLOCK + 30):
        w, gram, scale, zero = _problem(columns)
        h = gram + DAMPING * gram.diagonal().mean() * torch.eye(columns, dtype=torch.float64)
        left, wanted = w.double().clone(), torch.empty_like(w).double()
        for j in range(columns):
            inverse = torch.linalg.inv(h[j:, j:])
            wanted[:, j] = _nearest(left[:, j], scale[:, j].double(), zero[:, j].double())
            lost = (left[:, j] - wanted[:, j]) / inverse[0, 0]
            left[:, j:] -= lost[:, None] * inverse[0]
        got = rounded(w, gram, scale, zero, LOW, HIGH)
        assert float((got == wanted.float()).float().mean()) > 0.999
        assert torch.allclose(got, wanted.float(), rtol=1e-5, atol=1e-6) or columns > BLOCK


def test_comes_nearer_to_what_comes_out() -> None:
    w, gram, scale, zero = _problem(64)
    got = rounded(w, gram, scale, zero, LOW, HIGH)
    assert _error(w, got, gram) < 0.7 * _error(w, _nearest(w, scale, zero), gram)
    codes = got / scale
    assert torch.allclose(codes, codes.round(), atol=1e-4)
    assert float(codes.min()) > LOW - 0.1
    assert float(codes.max()) < HIGH + 0.1


def test_inputs_that_say_nothing_leave_the_nearest() -> None:
    w, _, scale, zero = _problem(32)
    for gram in (torch.zeros(32, 32), torch.eye(32) * 3, torch.full((32, 32), torch.nan)):
        got = rounded(w, gram, scale, zero + 1, LOW, HIGH)
        assert torch.allclose(got, _nearest(w, scale, zero + 1))
    assert torch.equal(counts(torch.zeros(3, 3)), torch.ones(3))
    assert bool((counts(torch.diag(torch.tensor([4.0, 0.0]))) > 0).all())
