"""Greedy removal by a Gram matrix: each time the unit that adds least to F(S) = Σ_{e,f∈S} G_ef.

Shape legend: N units of a group.
"""

from __future__ import annotations

import numpy as np


def greedy(gram: np.ndarray, blocks: int = 1) -> tuple[list[int], list[float]]:
    """All N units in the order in which they leave, of equals the lowest id, and what each adds.

    Args:
        gram: [N, N] G, symmetric.
        blocks: equal runs of units that must lose equal numbers: no run is ever two ahead.
    """
    run = len(gram) // blocks
    adds = gram.diagonal().copy()  # G_ee + 2 Σ_{f∈S} G_ef
    left = np.ones(len(gram), dtype=bool)
    order: list[int] = []
    added: list[float] = []
    for step in range(len(gram)):
        if step % blocks == 0:
            waiting = np.ones(blocks, dtype=bool)  # of this round
        open_ = left & np.repeat(waiting, run)
        e = int(np.argmin(np.where(open_, adds, np.inf)))
        order.append(e)
        added.append(float(adds[e]))
        left[e] = waiting[e // run] = False
        adds += 2 * gram[e]
    return order, added
