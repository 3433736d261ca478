"""U-Score: how differently an expert answers to different calibration domains (arXiv 2508.02291).

    S_e = max over pairs (a, b) of domains of SW1(g_e f_e | a, g_e f_e | b)

FAIR-Pruner's removal score with the calibration domains as classes and the expert's gated output,
0 where it is not routed, as the unit's output. SW1 is the Wasserstein distance along fixed
directions, averaged over them, from `core.sketch`.
"""

from __future__ import annotations

from torch import Tensor

from moe_fair.core.criterion import Criterion
from moe_fair.core.units import GroupView


def score(view: GroupView) -> Tensor:
    """[N] largest sliced W₁ of the gated output between two calibration domains.

    Raises:
        ValueError: there are fewer than two domains.
    """
    assert view.sketch is not None
    if int((view.domain_tokens > 0).sum()) < 2:
        raise ValueError(
            "u-score compares calibration domains and there are fewer than two: give "
            "-c name=text for each"
        )
    return view.sketch.scores(view.domain_tokens)


criteria = (Criterion("u-score", ("sketch",), "arXiv 2508.02291", score),)
