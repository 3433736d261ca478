"""Taylor scores: the loss as a function of a gate z on the unit, around z = 1.

t_s = ∂L_s/∂z = Σ a·∂L_s/∂a,  a the unit's output wherever it is read, L_s the loss of image s

taylor         |mean_s t_s|                the R-Score of FAIR-Pruner, gate form
taylor-sq      mean_s t_s²                 first order, Molchanov et al., arXiv 1906.10771
taylor-so      mean_s (-t_s + ½ t_s²)²     second order, ibid., with each image's empirical Fisher
                                           t_s² for the diagonal of the Hessian
taylor-weight  |mean_s Σ_w w·∂L_s/∂w|      over the unit's own filters; with batch statistics
                                           (train mode) it would vanish, see tests/vision
taylor-logits  mean_s [L(f_s - ∂f_s/∂z) - L(f_s)]   f the logits: linear in the gate, exact in the
                                           loss; as many backwards as classes
taylor-logits-sq  mean_s [ibid.]²

The last two are this project's. Where the net is sure of an image, the loss hardly changes when a
logit does, and t_s² is small for the wrong units; what a removal does to the logits is nearly
linear. Against measured removals: eval/RESULTS.md, "Vision: agreement with the oracle".
"""

from __future__ import annotations

from torch import Tensor

from moe_fair.core.criterion import Criterion
from moe_fair.core.units import GroupView


def absolute_mean(view: GroupView) -> Tensor:
    """[N] |mean over images|."""
    return view.rows.mean(0).abs()


def squared(view: GroupView) -> Tensor:
    """[N] mean over images of the square."""
    return view.rows.square().mean(0)


def second_order(view: GroupView) -> Tensor:
    """[N] mean square of the change that is expected at z = 0."""
    return (0.5 * view.rows.square() - view.rows).square().mean(0)


def weight_form(view: GroupView) -> Tensor:
    """[N] |Σ w·∂L/∂w|."""
    return view["weight_taylor"].abs()


def logits(view: GroupView) -> Tensor:
    """[N] the expected change of the loss."""
    return view["logit_change"]


def logits_squared(view: GroupView) -> Tensor:
    """[N] the mean square of every image's."""
    return view["logit_change_sq"]


criteria = (
    Criterion("taylor", ("rows",), "FAIR-Pruner's R, arXiv 2508.02291", absolute_mean),
    Criterion("taylor-sq", ("rows",), "arXiv 1906.10771", squared),
    Criterion("taylor-so", ("rows",), "arXiv 1906.10771, empirical Fisher", second_order),
    Criterion("taylor-logits", ("logit_change",), "this project", logits),
    Criterion("taylor-logits-sq", ("logit_change_sq",), "this project", logits_squared),
    Criterion("taylor-weight", ("weight_taylor",), "arXiv 2508.02291", weight_form),
)
