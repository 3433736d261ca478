"""What each calibration domain counts for: 1 unless a weight is given for it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from moe_fair.core.quote import clip, quote
from moe_fair.core.registry import nearest


def domain_weights(domains: Sequence[str], given: Mapping[str, float] | None) -> list[float]:
    """One weight a domain, in their order.

    Raises:
        ValueError: a weight for a domain that there is not (names the nearest), or none above 0.
    """
    given = given or {}
    for name in given:
        if name not in domains:
            raise ValueError(
                f"--weights: no calibration domain {quote(name)}{nearest(name, domains)}; "
                f"there are {clip(', '.join(domains), 400)}"
            )
    found = [given.get(d, 1.0) for d in domains]
    if not any(found):
        raise ValueError(
            f"--weights: every weight is 0, of {clip(', '.join(domains), 400)}; leave one in"
        )
    return found
