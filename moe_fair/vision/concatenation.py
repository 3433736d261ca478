"""Concatenations with a part that no layer makes: the picture itself, coordinates, a constant.

Torch-Pruning sees the parts that have a gradient and counts these alone, so that it takes channels
behind such a part for others.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

CONCATENATIONS = (torch.cat, torch.concat, torch.concatenate)
Span = tuple[int, int]


class Parts(TorchFunctionMode):
    """Notes where channels lie in such concatenations that are made while it is open.

    Attributes:
        spans: what made the concatenation -> first channel of each part with a gradient, and the
            one behind its last.
    """

    def __init__(self) -> None:
        super().__init__()
        self.spans: dict[Any, list[Span]] = {}

    def __torch_function__(
        self, func: Any, types: Any, args: tuple = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        named = kwargs or {}
        out = func(*args, **named)
        if func in CONCATENATIONS and isinstance(out, Tensor) and out.grad_fn is not None:
            parts = args[0] if args else named["tensors"]
            axis = args[1] if len(args) > 1 else named.get("dim", named.get("axis", 0))
            if axis % out.dim() == 1 and not all(t.requires_grad for t in parts):
                self.spans[out.grad_fn] = _spans(parts)
        return out

    def place(self, node: Any) -> None:
        """Say to a node of Torch-Pruning's graph where its parts really lie."""
        from torch_pruning.dependency.index_mapping import _ConcatIndexMapping

        spans = self.spans.get(node.grad_fn, [])
        if len(spans) != len(node.inputs):  # none, or one part is not followed, or comes in twice
            return
        for part, span in zip(node.inputs, spans, strict=True):
            for dependency, back in (
                *((d, True) for d in node.dependencies if d.target is part),
                *((d, False) for d in part.dependencies if d.target is node),
            ):
                dependency.index_mapping[1] = _ConcatIndexMapping(offset=span, reverse=back)


def _spans(parts: Any) -> list[Span]:
    """Of the parts that have a gradient."""
    found, at = [], 0
    for t in parts:
        if t.requires_grad:
            found.append((at, at + t.shape[1]))
        at += t.shape[1]
    return found
