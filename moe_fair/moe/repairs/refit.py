"""New down projections for the remaining experts (METHODS §7):

    min over W   Σ_t ‖y(t) - Σ_e g_e h_e(t) W_e‖² + λ Σ_e ‖W_e - a W_e⁰‖²

Few and narrow experts: the normal equations are solved as they are. Else by conjugate gradients,
forward and adjoint only, with the diagonal as the preconditioner: experts that few tokens reach
have much smaller equations than busy ones.
"""

from __future__ import annotations

import torch
from torch import Tensor

from moe_fair.moe.repairs.scale import factor
from moe_fair.moe.routed import Routed, read_down

name = "refit"
ridges = (0.01, 0.1, 1.0)
wants_text = True
DIRECT = 4096  # unknowns per column up to which the matrix is formed
ITERATIONS = 15
SOLVED = 1e-6  # of the right-hand side's norm


def fit(
    routed: Routed,
    target: Tensor,
    ridge: float,
    *,
    direct: int = DIRECT,
    iterations: int = ITERATIONS,
    solved: float = SOLVED,
) -> Tensor:
    """[E, F, D]; λ is the ridge times the mean of Σ (g·h)² over hidden activations.

    Args:
        direct: most E·F for which the normal equations are solved directly.
        iterations, solved: conjugate gradients stop after so many, or when the residual has come
            down to this share.
    """
    start = read_down(routed.experts)
    y = routed.output(start)
    a = factor(y, target)
    w = a * start
    squares = routed.squares()
    weight = ridge * float(squares.mean())
    residual = routed.adjoint(target - a * y)  # the ridge has no pull at its own centre
    if squares.numel() <= direct:
        matrix = routed.gram.clone()
        # experts that no token reached have nothing but the ridge
        matrix.diagonal().add_(weight).clamp_(min=1e-12 * float(squares.mean()) + 1e-300)
        step = torch.linalg.solve(matrix, residual.flatten(0, 1).double())
        return w + step.view_as(w).to(w.dtype)
    scale = (squares + weight).clamp(min=torch.finfo(w.dtype).tiny).unsqueeze(-1)
    direction = residual / scale
    rho = float((residual * direction).sum(dtype=torch.float64))
    first = rho
    for _ in range(iterations):
        if rho <= solved**2 * first or rho <= 0:
            break
        image = routed.adjoint(routed.output(direction)) + weight * direction
        length = rho / float((direction * image).sum(dtype=torch.float64))
        w += length * direction
        residual -= length * image
        z = residual / scale
        old, rho = rho, float((residual * z).sum(dtype=torch.float64))
        direction = z + (rho / old) * direction
    return w
