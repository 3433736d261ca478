"""Rounding to few bits, each column making good what those before it lost (GPTQ).

    min over codes of  tr (Ŵ - W) H (Ŵ - W)ᵀ,     H = Σ h hᵀ over a matrix's inputs

Columns are rounded in turn, and what one loses is taken from those that are still to come, by the
Cholesky factor of H⁻¹ (Frantar et al. 2022, arXiv:2210.17323). Scales are chosen before.

Shape legend: R rows, C columns.
"""

from __future__ import annotations

import torch
from torch import Tensor

DAMPING = 0.01  # of H's mean diagonal, added to it
BLOCK = 128  # columns after which the rest is brought up to date


def counts(gram: Tensor) -> Tensor:
    """[C] by which each column counts; none for nothing, whatever the text."""
    diagonal = gram.diagonal().float()
    return diagonal + DAMPING * diagonal.mean() if bool(diagonal.any()) else diagonal + 1


def rounded(
    values: Tensor, gram: Tensor, scale: Tensor, zero: Tensor, low: int, high: int
) -> Tensor:
    """[R, C] numbers of the form (code - zero) · scale, for codes of low to high.

    Args:
        values: [R, C].
        gram: [C, C] H.
        scale, zero: [R, C].
    """
    w, scale, zero, h = values.double(), scale.double(), zero.double(), gram.double()
    u = _factor(h)
    if u is None:  # not a number somewhere
        u = torch.eye(len(h), dtype=h.dtype, device=h.device)
    w, out = w.clone(), torch.empty_like(w)
    columns = w.shape[1]
    for start in range(0, columns, BLOCK):
        end = min(start + BLOCK, columns)
        lost = w.new_zeros(len(w), end - start)
        for j in range(start, end):
            codes = (w[:, j] / scale[:, j] + zero[:, j]).round().clamp(low, high)
            out[:, j] = (codes - zero[:, j]) * scale[:, j]
            lost[:, j - start] = (w[:, j] - out[:, j]) / u[j, j]
            w[:, j + 1 : end] -= lost[:, j - start, None] * u[j, j + 1 : end]
        w[:, end:] -= lost @ u[start:end, end:]
    return out.to(values.dtype)


def _factor(h: Tensor) -> Tensor | None:
    """Upper Cholesky factor of (H + damping)⁻¹; None where there is none."""
    mean = h.diagonal().mean()
    damped = h + torch.eye(len(h), dtype=h.dtype, device=h.device) * (DAMPING * mean)
    lower, wrong = torch.linalg.cholesky_ex(damped)
    if wrong:
        return None
    upper, wrong = torch.linalg.cholesky_ex(torch.cholesky_inverse(lower), upper=True)
    return None if wrong else upper
