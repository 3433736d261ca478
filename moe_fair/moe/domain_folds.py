"""Parts of the calibration domains that are left out one at a time, so that they can judge.

What is chosen by text of the very documents or domains that taught it looks better than it is. Of
D domains, domain d is in part d mod min(D, 4). A part that has more than half of the text is never
left out: what is left would be too little, and not what was asked for.
"""

from __future__ import annotations

from collections.abc import Mapping

FOLDS = 4


def domain_folds(sizes: Mapping[int, int]) -> list[set[int]]:
    """The parts that can be left out; none of a single domain.

    Args:
        sizes: of each domain, by its index, how much text it has.
    """
    domains = sorted(d for d, n in sizes.items() if n)
    parts = [set(domains[k::FOLDS]) for k in range(min(FOLDS, len(domains)))]
    half = sum(sizes.values()) / 2
    return [p for p in parts if sum(sizes[d] for d in p) <= half]
