"""Telling a text that runs in circles from one that a model has something to say in.

    repeats(x) = 1 - |{n-grams of x}| / (number of n-grams of x)

At temperature 1 a model rarely falls into a loop, but does not get out of one: what comes next is
certain, so its entropy there is far below what it has elsewhere. Tables and code repeat themselves
as well; so some repetition is a loop only where the model is sure of itself, and much always is.
"""

from __future__ import annotations

from collections.abc import Sequence

N = 4  # tokens of an n-gram
SHORTEST = 32  # tokens below which nothing is said
MOST = 0.6  # share of n-grams that have come before
SURE = 0.3  # the same where the model is sure of itself: its entropy below this share
ENTROPY = 0.25  # of what it usually is


def repeats(ids: Sequence[int]) -> float:
    """Share of the n-grams that have come before."""
    grams = [tuple(ids[i : i + N]) for i in range(len(ids) - N + 1)]
    return 1 - len(set(grams)) / len(grams) if grams else 0.0


def is_loop(ids: Sequence[int], entropy: float | None = None, usual: float | None = None) -> bool:
    """Whether a text runs in circles.

    Args:
        entropy: of the model's predictions, on average over the text; None where it is not known.
        usual: the same over the texts beside it.
    """
    if len(ids) < SHORTEST:
        return False
    again = repeats(ids)
    sure = entropy is not None and usual is not None and entropy < ENTROPY * usual
    return again >= MOST or (sure and again >= SURE)
