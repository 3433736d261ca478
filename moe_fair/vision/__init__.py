"""FAIR-Pruner for image classifiers: the channels of a coupled group are its units.

from moe_fair.vision import load_pruned
model = load_pruned("out")
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from moe_fair.vision.checkpoint import load_pruned

__all__ = ["load_pruned"]


def __getattr__(name: str) -> Any:
    if name in __all__:
        from moe_fair.vision import checkpoint

        return getattr(checkpoint, name)
    raise AttributeError(f"module 'moe_fair.vision' has no attribute {name!r}")
