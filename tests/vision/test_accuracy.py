"""How a latency's interval is taken; that it is one of the clock is not tested here."""

from __future__ import annotations

import pytest
from scipy.stats import binom
from torch import nn, rand

from moe_fair.vision.accuracy import FEWEST, MOST, between, guessed, latency
from moe_fair.vision.data import ImageSet


@pytest.mark.parametrize("count", [FEWEST, 7, 13, 25, MOST])
def test_the_narrowest_order_statistics_that_hold_the_median(count: int) -> None:
    values = [float(v) for v in range(count)]
    low, high = between(list(reversed(values)))

    def held(low: float, high: float) -> float:
        """So many of the values are below the median, each with a chance of a half."""
        return binom.cdf(high, count, 0.5) - binom.cdf(low, count, 0.5)

    assert low + high == count - 1
    assert held(low, high) >= 0.95
    assert held(low + 1, high - 1) < 0.95


def test_turns_are_taken_until_the_time_is_up_and_six_in_any_case() -> None:
    calls = {"dense": 0, "pruned": 0}

    class Counted(nn.Module):
        def __init__(self, name: str) -> None:
            super().__init__()
            self.name, self.layer = name, nn.Linear(2, 2)

        def forward(self, x):  # type: ignore[no-untyped-def]
            calls[self.name] += 1
            return self.layer(x.flatten(1)[:, :2])

    models = {n: Counted(n) for n in calls}
    [one] = latency(models, rand(1, 3, 2, 2), seconds=0)
    assert calls == {"dense": FEWEST + 1, "pruned": FEWEST + 1}
    assert one["batch"] == 1
    assert one["low"] <= one["faster"] <= one["high"]
    [one, many] = latency(models, rand(1, 3, 2, 2), seconds=60)
    assert calls["dense"] == FEWEST + 1 + 2 * (MOST + 1)
    assert (one["batch"], many["batch"]) == (1, 8)


@pytest.mark.parametrize(
    ("share", "labels", "said"),
    [
        (0.5, [0, 1] * 50, True),
        (0.59, [0, 1] * 50, True),  # within two standard errors of a half
        (0.61, [0, 1] * 50, False),
        (0.9, [0] * 90 + [1] * 10, True),  # naming one class does as well
        (0.99, [0] * 90 + [1] * 10, False),
    ],
)
def test_a_model_that_guesses_is_told(share: float, labels: list[int], said: bool) -> None:
    images = ImageSet(lambda i: None, labels, ("a", "b"), lambda x: x, "images")
    assert guessed(share, images) is said
