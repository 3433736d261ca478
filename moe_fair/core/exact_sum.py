"""Sums that do not depend on the order of their terms, so that shards of the data may come anyhow.

A sum is kept as two float64: the rounded total, and what rounding has taken from it so far (Ogita,
Rump and Oishi 2005, Sum2). The pair holds the sum to twice the working precision; the order in
which processes or devices added up shows only in digits that are rounded away in the end.
"""

from __future__ import annotations

from torch import Tensor


def two_sum(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    """`a + b` rounded, and its rounding error: their sum is exact (Knuth). Any shapes, float64."""
    total = a + b
    b_in_total = total - a
    return total, (a - (total - b_in_total)) + (b - b_in_total)
