"""What a layer is called with, by place or by keyword, as a hook with keywords is given it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor


def given(inputs: Sequence[Tensor], named: Mapping[str, Tensor]) -> Tensor:
    """The input: the first that is given by place, or else by keyword."""
    return inputs[0] if inputs else next(iter(named.values()))


def with_input(
    inputs: Sequence[Any], named: Mapping[str, Any], x: Tensor
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """The same call with another input."""
    if inputs:
        return (x, *inputs[1:]), dict(named)
    return (), {**named, next(iter(named)): x}
