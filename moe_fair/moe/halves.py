"""The halves of a calibration text whose agreement tells how firm a choice is."""

from __future__ import annotations

from torch import Tensor


def in_first_half(sequence_ids: Tensor) -> Tensor:
    """[B] whether a sequence is of the first half: every other one, so of every domain's text."""
    return sequence_ids % 2 == 0
