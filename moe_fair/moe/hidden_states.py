"""The hidden states of every batch between two layers, on the device or in main memory."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence

import torch
from torch import Tensor


class HiddenStates(Sequence[Tensor]):
    """[B, L, D] of each batch.

    Args:
        apart: between uses they lie in main memory, and are brought to the device one by one.
    """

    def __init__(self, parts: Iterable[Tensor], device: torch.device, *, apart: bool) -> None:
        self.device, self.apart = device, apart
        self._parts: list[Tensor] = []
        for part in parts:
            self.append(part)

    def __len__(self) -> int:
        return len(self._parts)

    def __getitem__(self, j: int) -> Tensor:  # type: ignore[override]
        return self._parts[j].to(self.device)

    def __setitem__(self, j: int, hidden: Tensor) -> None:
        self._parts[j] = self._kept(hidden)

    def __iter__(self) -> Iterator[Tensor]:
        return (self[j] for j in range(len(self)))

    def append(self, hidden: Tensor) -> None:
        """Of one batch more."""
        self._parts.append(self._kept(hidden))

    def branch(self) -> HiddenStates:
        """A second stream that begins with the same states, held once."""
        other = HiddenStates((), self.device, apart=self.apart)
        other._parts = list(self._parts)
        return other

    def follow(self, other: HiddenStates, j: int) -> None:
        """Take the other's states of a batch, held once."""
        self._parts[j] = other._parts[j]

    def same(self, other: HiddenStates, j: int) -> bool:
        """Both hold the same states of a batch, not only equal ones."""
        return self._parts[j] is other._parts[j]

    def _kept(self, hidden: Tensor) -> Tensor:
        return hidden.cpu() if self.apart else hidden
