"""What a model gives for images, and whether another gives the same."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from moe_fair.vision.graph import logits

CLOSE = 1e-4  # of the largest output; another number of threads adds up in another order


def answers(model: nn.Module, images: Tensor) -> Tensor:
    """The logits in eval mode; the model is left as it was."""
    parameter, training = next(model.parameters()), model.training
    try:
        with torch.no_grad():
            x = images.to(parameter.device, parameter.dtype)
            return logits(model.eval(), x).cpu()
    finally:
        model.train(training)


def same(wanted: Tensor, found: Tensor) -> bool:
    """Up to rounding; NaN is the same as nothing."""
    if wanted.shape != found.shape:
        return False
    scale = float(wanted.abs().max())
    return float((wanted - found).abs().max()) <= CLOSE * scale
