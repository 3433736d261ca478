"""Measuring the oracle: what the loss of every image becomes when one unit is removed alone.

Each unit's gate is closed in turn, which is the model without the unit, exactly. How a score agrees
with it: `core.oracle`.

Shape legend: S images, N units of a group.
"""

from __future__ import annotations

from collections.abc import Sequence

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
