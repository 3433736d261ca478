"""Which calibration sequences judge a fit, and which teach it."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from moe_fair.engines.batch import Batch

HELD_OUT = 5  # every fifth sequence judges the fits


def judges(batch: Batch) -> Tensor:
    """[B] which sequences judge the fits instead of teaching them."""
    return batch.sequence_ids % HELD_OUT == HELD_OUT - 1


def teaching(batches: Sequence[Batch]) -> list[Batch]:
    """What is left of the batches without the sequences that judge."""
    left = []
    for b in batches:
        stays = ~judges(b)
        if bool(stays.any()):
            ids, mask, sequences = (t[stays] for t in (b.input_ids, b.mask, b.sequence_ids))
            left.append(Batch(ids, mask, sequences, b.domain))
    return left
