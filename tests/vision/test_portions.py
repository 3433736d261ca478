"""How many images a forward takes."""

from __future__ import annotations

import pytest
import torch

from moe_fair.vision.portions import portion

CPU, CUDA = torch.device("cpu"), torch.device("cuda")


@pytest.mark.parametrize(
    ("side", "most", "device", "images"),
    [
        (224, 64, CPU, 4),
        (224, 2, CPU, 2),
        (1024, 64, CPU, 1),  # one image is run, however large
        (32, 64, CPU, 64),
        (224, 64, CUDA, 64),  # an accelerator gives its memory out itself
    ],
)
def test_the_images_of_a_forward(side: int, most: int, device: torch.device, images: int) -> None:
    empty = torch.empty(1, 3, 1, 1).expand(100, 3, side, side)
    assert portion(empty, most, device) == images
