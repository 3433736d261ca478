"""Each expert removed alone, measured on a share of the text (`pipelines.removal_costs`).

This project's, for `counterfactual-measured`. Runs of the whole model measure it, after the pass in
which the other families collect.
"""

from __future__ import annotations

from moe_fair.moe.statistic import Statistic

name = "alone"
names = {
    "alone_change": Statistic("E", "change of the summed loss, in nats", kind="measured"),
    "alone_first": Statistic("E", "Σ δ_e on the same tokens", kind="measured"),
    "alone_fisher": Statistic("E", "Σ ½ δ_e² on the same tokens", kind="measured"),
    "alone_tokens": Statistic("E", "number of these tokens", kind="measured"),
}
