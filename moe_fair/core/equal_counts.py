"""The one number that all groups keep, where what serves the result takes no other."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from moe_fair.core.plan_parts import ModelSize, Target
from moe_fair.core.units import UnitGroup


def equal_count(
    groups: Sequence[UnitGroup],
    depths: Sequence[np.ndarray],
    target: Target,
    before: ModelSize,
) -> int:
    """What every group keeps for a target; of a share the nearest, of a size the most that fits.

    Args:
        depths: of each group those that are allowed.
        before: size of the whole model.

    Raises:
        ValueError: the target stands for no number that all can keep; names the nearest.
    """
    each = [{int(g.size - d) for d in own} for g, own in zip(groups, depths, strict=True)]
    possible = sorted(set.intersection(*each))
    if not possible:
        raise ValueError("there is no number of units that every layer can keep")
    if target.tolerance is not None:
        raise ValueError(
            "--tolerance gives every layer a number of its own, and here all keep the same; give "
            "--experts, --total, --ratio or --size"
        )
    if target.parameters is not None or target.bytes is not None:
        return _fitting(groups, possible, target, before)
    body = [g for g in groups if not g.follows]
    if target.ratio is not None:
        wanted = sum(g.size for g in body) * (1 - target.ratio) / len(body)
        step = possible[1] - possible[0] if len(possible) > 1 else 1
        if wanted < possible[0] - step / 2:
            raise ValueError(
                f"--ratio {target.ratio:g} is out of reach: every layer must keep the same number "
                f"here, and {possible[0]} is the fewest that all can keep"
            )
        return min(possible, key=lambda n: (abs(n - wanted), -n))
    if target.mean_kept is not None:
        return _exact(possible, target.mean_kept, "--experts", 1)
    assert target.total is not None
    return _exact(possible, target.total / len(body), "--total", len(body))


def _exact(possible: Sequence[int], wanted: float, flag: str, times: int) -> int:
    if wanted in possible:
        return int(wanted)
    near = [max((n for n in possible if n < wanted), default=None)]
    near.append(min((n for n in possible if n > wanted), default=None))
    names = " and ".join(str(n * times) for n in near if n is not None)
    raise ValueError(
        f"{flag} {wanted * times:g}: every layer must keep the same number here, and the nearest "
        f"{flag} for which one can be is {names}"
    )


def _fitting(
    groups: Sequence[UnitGroup], possible: Sequence[int], target: Target, before: ModelSize
) -> int:
    unit = "parameters" if target.parameters is not None else "bytes"
    limit = getattr(target, unit)
    names = [g.name for g in groups]
    sizes = {
        n: getattr(before.without(tuple(groups), dict.fromkeys(names, n)), unit) for n in possible
    }
    fitting = [n for n in possible if sizes[n] <= limit]
    if not fitting:
        raise ValueError(
            f"--size {limit:,} {unit} is out of reach: with {possible[0]} units in every layer "
            f"the model still has {sizes[possible[0]]:,} {unit}"
        )
    return fitting[-1]
