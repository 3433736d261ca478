"""The oracle: how much the loss really changes when one unit is removed and nothing else.

Molchanov et al., arXiv 1906.10771, judge criteria by their correlation with it. Each unit's gate is
closed in turn, which is the model without the unit, exactly.

Shape legend: S images, N units of a group.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from moe_fair.vision.gates import Gates
from moe_fair.vision.graph import ChannelGroup, logits


def loss_changes(
    model: nn.Module, groups: Sequence[ChannelGroup], images: Tensor, labels: Tensor
) -> dict[str, Tensor]:
    """Group -> [S, N] float64: each image's cross-entropy without the unit, minus that with it.

    One forward of all images for every unit, in eval mode.

    Args:
        images, labels: [S, C, H, W] and [S]; one batch.
    """
    device = next(model.parameters()).device
    x, y = images.to(device), labels.to(device)
    training = model.training
    model.eval()

    def loss() -> Tensor:
        out = logits(model, x).double()
        return nn.functional.cross_entropy(out, y, reduction="none").cpu()

    changes = {g.name: torch.zeros(len(x), g.units.size, dtype=torch.float64) for g in groups}
    with torch.no_grad(), Gates(model, groups) as gates:
        whole = loss()
        for g in groups:
            for unit in range(g.units.size):
                gates.values = torch.ones(1, gates.total + 1)
                gates.values[0, gates.offsets[g.name] + unit] = 0
                changes[g.name][:, unit] = loss() - whole
    model.train(training)
    return changes


def correlations(scores: Mapping[str, Tensor], changes: Mapping[str, Tensor]) -> dict[str, float]:
    """Agreement of scores with the oracle.

    Returns:
        `pearson` and `spearman` over all units, and `within`: Spearman within each group, averaged
        over groups weighted by their units (groups of one unit or of equal values left out).
    """
    from scipy.stats import pearsonr, spearmanr

    names = list(changes)
    a = torch.cat([scores[n] for n in names]).numpy()
    b = torch.cat([changes[n] for n in names]).numpy()
    within = total = 0.0
    for n in names:
        u, v = scores[n], changes[n]
        if len(u) > 1 and float(u.std()) > 0 and float(v.std()) > 0:
            within += len(u) * float(spearmanr(u.numpy(), v.numpy()).statistic)
            total += len(u)
    return {
        "pearson": float(pearsonr(a, b).statistic),
        "spearman": float(spearmanr(a, b).statistic),
        "within": within / total if total else float("nan"),
    }
