"""New down projections for the remaining experts, by ridge regression (docs/methods.md, section 7):

    min over W   Σ_t ‖y(t) - Σ_e g_e h_e(t) W_e‖² + λ Σ_e ‖W_e - a W_e⁰‖²

Few and narrow experts: the normal equations are solved as they are. Else by block Gauss-Seidel:
one expert after another is fitted to what the others leave over, by a Cholesky factor of its own
Gram matrix (Golub & Van Loan, Matrix Computations, 4th ed., section 11.2). Tokens that two experts
share couple them, and top-k routing keeps that coupling weak, so that few sweeps are enough. From
the strongest ridge to the weakest each fit goes on from the last.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from moe_fair.moe.repairs.scale import factor
from moe_fair.moe.routed_output import RoutedOutput, read_down

name = "refit"
ridges = (0.01, 0.1, 1.0)
wants_text = True
DIRECT = 4096  # unknowns per column up to which the matrix is formed
SWEEPS = 2  # for each ridge; one where a solution on other tokens is at hand
SOLVED = 1e-6  # of the largest sweep's step


def fit(routed: RoutedOutput, target: Tensor, ridge: float) -> Tensor:
    """[E, F, D]; λ is the ridge times the mean of Σ (g·h)² over hidden activations."""
    return next(path(routed, target, [ridge]))[1]


def path(
    routed: RoutedOutput,
    target: Tensor,
    ridges: Sequence[float],
    start: Tensor | None = None,
    *,
    direct: int = DIRECT,
    sweeps: int | None = None,
    solved: float = SOLVED,
) -> Iterator[tuple[float, Tensor]]:
    """Each ridge, strongest first, with its down projections [E, F, D].

    Args:
        start: solution on other tokens, from which the sweeps go on.
        direct: most E·F for which the normal equations are solved directly.
        sweeps, solved: Gauss-Seidel stops after so many, or when a sweep's step has come down to
            this share of the largest.
    """
    stock = read_down(routed.experts)
    squares = routed.squares()
    mean = float(squares.mean())
    if squares.numel() <= direct:
        yield from _directly(routed, target, ridges, stock, mean)
        return
    y = routed.output(stock)
    a = factor(y, target)
    sweeps = sweeps or (SWEEPS if start is None else 1)
    w = a * stock if start is None else start.to(stock, copy=True)
    del stock
    rest = target - (a * y if start is None else routed.output(w))
    del y
    for ridge in sorted(ridges, reverse=True):
        weight = max(ridge * mean, 1e-12 * mean + 1e-300)
        factors = [_factor(gram, weight) for gram in routed.own_grams()]
        largest = 0.0
        for _ in range(sweeps):
            moved = torch.zeros((), dtype=torch.float32, device=w.device)
            for e, (tokens, h) in enumerate(routed.features()):
                if not len(tokens):
                    continue
                centre = a * read_down(routed.experts, slice(e, e + 1))[0]  # not held: too large
                pull = h.T @ rest[tokens] - weight * (w[e] - centre)
                step = torch.cholesky_solve(pull, factors[e])
                w[e] += step
                rest.index_add_(0, tokens, h @ step, alpha=-1)
                moved += step.square().sum()
            largest = max(largest, float(moved))
            if float(moved) <= solved**2 * largest:
                break
        yield ridge, w.clone()


def _directly(
    routed: RoutedOutput, target: Tensor, ridges: Sequence[float], stock: Tensor, mean: float
) -> Iterator[tuple[float, Tensor]]:
    """By the normal equations, which also say what the best factor is."""
    wanted = routed.adjoint(target).flatten(0, 1).double()
    now = stock.flatten(0, 1).double()
    given = routed.gram @ now
    size = float((now * given).sum())
    a = float((now * wanted).sum()) / size if size > 0 else 1.0
    residual = wanted - a * given  # the ridge has no pull at its own centre
    for ridge in sorted(ridges, reverse=True):
        matrix = routed.gram.clone()
        # experts that no token reached have nothing but the ridge
        matrix.diagonal().add_(ridge * mean).clamp_(min=1e-12 * mean + 1e-300)
        step = _solved(matrix, residual)
        yield ridge, (a * now + step).view_as(stock).to(stock.dtype)


def _solved(matrix: Tensor, right: Tensor) -> Tensor:
    """matrix⁻¹ right of a symmetric matrix that is positive, but for rounding."""
    factor, bad = torch.linalg.cholesky_ex(matrix)
    if bool(bad):
        return torch.linalg.solve(matrix, right)
    return torch.cholesky_solve(right, factor)


def _factor(gram: Tensor, weight: float) -> Tensor:
    """Cholesky factor [F, F] of hᵀh + λI."""
    gram = gram.clone()
    gram.diagonal().add_(weight)
    return torch.linalg.cholesky(gram)
