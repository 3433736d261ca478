"""Gate Taylor scores: the first-order change of the loss when an expert's output is switched off.

    t_e(x_t) = ⟨∂L/∂y_t, g_e f_e(x_t)⟩, zero where e is not routed; L the mean loss of the sequence

and over the sequences s of the calibration set

    taylor      |mean_s Σ_{t∈s} t_e|      the protection score of `--method fair`
    taylor-abs  Σ_t |t_e|
    taylor-sq   mean_s (Σ_{t∈s} t_e)²     the minibatch form of Molchanov et al., arXiv 1906.10771
"""

from __future__ import annotations

from torch import Tensor

from moe_fair.core.criterion import Criterion
from moe_fair.core.units import GroupView


def absolute_mean(view: GroupView) -> Tensor:
    """[N] |mean over sequences| of t, the gate Taylor value."""
    return view["taylor"].abs() / view.total_sequences


def per_token(view: GroupView) -> Tensor:
    """[N] Σ |t| per calibration token."""
    return view["taylor_abs"] / view.total_tokens


def per_sequence_squared(view: GroupView) -> Tensor:
    """[N] mean over sequences of (Σ t)²."""
    return (view.row_weights @ view.rows.square()) / view.row_weights.sum()


criteria = (
    Criterion("taylor", ("taylor",), "FAIR-Pruner's R, arXiv 2508.02291", absolute_mean),
    Criterion("taylor-abs", ("taylor_abs",), "this project", per_token),
    Criterion("taylor-sq", ("rows",), "arXiv 1906.10771", per_sequence_squared),
)
