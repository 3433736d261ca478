"""What became of every layer, as `result.json` has it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from moe_fair.vision.sparse.layers import Layer


def layer_table(
    layers: Sequence[Layer],
    zeros: Mapping[str, int],
    shifts: Mapping[str, str],
    scores: Mapping[str, Mapping[str, float]],
) -> list[dict[str, Any]]:
    """A row for each layer.

    Args:
        zeros: layer -> weights that are zero.
        shifts: layer -> what takes up its repair's shift; empty without repair.
        scores: layer -> what the rule measured of it, if it did.
    """
    return [
        {
            "name": x.name,
            "shape": list(x.shape),
            "weights": x.size,
            "kept": x.size - zeros[x.name],
            "sparsity": zeros[x.name] / x.size,
            **({"shift": shifts[x.name]} if shifts else {}),
            **scores.get(x.name, {}),
        }
        for x in layers
    ]
