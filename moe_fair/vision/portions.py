"""How many images a forward takes."""

from __future__ import annotations

import torch
from torch import Tensor

# on a CPU. What the C library gives out in pieces of more than 32 MB it asks the system for each
# time, which clears every page: a third of a ResNet-50's time with 24 images, nothing with 4
PLACES = 4 * 224 * 224


def portion(images: Tensor, most: int, device: torch.device) -> int:
    """So many images at once, one or more, each of which gets the same numbers in any company.

    Args:
        images: [S, C, H, W].
        most: what the user allows.
        device: where the model is.
    """
    if device.type != "cpu":
        return most
    return max(1, min(most, PLACES // max(1, images[0, 0].numel())))
