"""A layer of each packed checkpoint, unpacked on the CPU and on the pretend device: same bytes.

python tests/device/pretend.py tests/device/packed.py FOLDER
"""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

import torch
from packing import COMPRESSED, SCHEMES

from moe_fair.engines.layers import LayeredModel
from moe_fair.moe.checkpoint_source import Checkpoint


def layer(source: Checkpoint, device: str) -> dict[str, torch.Tensor]:
    """One layer's weights, back on the CPU."""
    layered = LayeredModel(
        source.path, source.config, dtype=torch.bfloat16, device=torch.device(device),
        packing=source.packing,
    )  # fmt: skip
    with layered.layer(1) as module:
        return {n: p.detach().cpu().clone() for n, p in module.named_parameters()}


def main() -> None:
    """A line for each scheme that can be written here."""
    try:
        import compressed_tensors  # noqa: F401

        names = list(SCHEMES)
    except ImportError:
        names = [n for n in SCHEMES if n not in COMPRESSED]
    for name in names:
        folder = Path(sys.argv[1]) / name
        SCHEMES[name](folder)
        source = Checkpoint(str(folder))
        here, there = layer(source, "cpu"), layer(source, "cuda:0")
        assert all(torch.equal(t, there[n]) for n, t in here.items()), name
        print(name)


if __name__ == "__main__":
    main()
