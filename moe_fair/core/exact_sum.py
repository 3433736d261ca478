"""Sums that do not depend on the order of their terms, so that shards of the data may come anyhow.

A sum is kept as two float64: the rounded total, and what rounding has taken from it so far (Ogita,
Rump and Oishi 2005, Sum2). The pair holds the sum to twice the working precision; the order in
which processes or devices added up shows only in digits that are rounded away in the end.
"""

from __future__ import annotations

import torch
from torch import Tensor


def two_sum(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    """`a + b` rounded, and its rounding error: their sum is exact (Knuth). Any shapes, float64."""
    total = a + b
    b_in_total = total - a
    return total, (a - (total - b_in_total)) + (b - b_in_total)


def add_exactly(totals: list[Tensor], lost: list[Tensor], terms: list[Tensor]) -> None:
    """Add each term to its total in place, and what rounding takes from it to its `lost`.

    Float64 tensors of any shapes; on a device in as many launches for all as `two_sum` for one.
    """
    if not totals:
        return
    new = torch._foreach_add(totals, terms)
    term = torch._foreach_sub(new, totals)  # of the sum, the term's part; then the total's
    total = torch._foreach_sub(new, term)
    errors = torch._foreach_sub(totals, total)
    torch._foreach_add_(errors, torch._foreach_sub(terms, term))
    torch._foreach_add_(lost, errors)
    torch._foreach_copy_(totals, new)
