"""How far calibration text carries a plan: what every domain loses, and how firm the choice is.

For a plan that removes the set R_l of layer l, with G_d[e] the sum of the router's weights of
expert e in domain d, and R_l(c, T) the |R_l| experts that a criterion c ranks lowest on text T,

    routed     Σ_l Σ_{e ∈ R_l} G_d[e] / Σ_l Σ_e G_d[e]
    without    Σ_l |R_l(c, T) ∩ R_l(c, T without d)| / Σ_l |R_l|
    halves     Σ_l |R_l(t, half of T) ∩ R_l(t, the other half)| / Σ_l |R_l|

with c the plan's removal criterion. t is `counterfactual-fisher`, what one expert alone adds to the
second order of the loss, where c is of that kind: of it one half's sum is kept beside the whole
text's. Elsewhere t is `taylor-sq`, where its values are kept for every sequence.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from moe_fair.core.criterion import Criterion, round_significant
from moe_fair.core.domain_weights import domain_weights
from moe_fair.core.plan import GroupPlan
from moe_fair.core.ranking import rank
from moe_fair.core.units import Scores, Statistics, UnitGroup
from moe_fair.moe.criteria import criteria
from moe_fair.moe.halves import in_first_half

MASS, WHOLE, HALF = "gate", "removed_gram", "removed_half_sq"
TAYLOR, FISHER = "taylor-sq", "counterfactual-fisher"
MOST = 16  # domains
DIGITS = 4


@dataclass(frozen=True)
class Coverage:
    """See the module; shares of 1, and None or nothing where statistics do not tell.

    Attributes:
        routed, without: by domain.
        chance: what `halves` would be if text told nothing.
        halves_by: the criterion that the halves were asked by.
    """

    routed: dict[str, float]
    without: dict[str, float]
    halves: float | None
    chance: float | None
    halves_by: str | None = None


def coverage(
    groups: Sequence[GroupPlan],
    statistics: Statistics,
    rule: Criterion,
    weights: Mapping[str, float] | None,
) -> Coverage | None:
    """What is known; None of a plan that removes nothing, or rests on no text.

    Args:
        rule: the plan's removal criterion.
        weights: its domain weights.
    """
    mine = {g.name: g for g in groups if g.depth and not g.follows}
    statistics = replace(statistics, groups=tuple(g for g in statistics.groups if g.name in mine))
    if not mine or not rule.needs or not statistics.tokens.any():
        return None
    removed = {n: sorted({*range(g.size)} - {*g.kept}) for n, g in mine.items()}
    routed, without = _routed(statistics, removed), _without(statistics, removed, rule, weights)
    asked = FISHER if WHOLE in rule.needs and statistics.holds(HALF) else TAYLOR
    sides = (_fisher if asked == FISHER else _taylor)(statistics, weights)
    if sides is None:
        return Coverage(routed, without, None, None)
    first, second = (_lowest(Scores(asked, s), statistics.groups, removed) for s in sides)
    sizes, total = {g.name: g.size for g in statistics.groups}, sum(map(len, removed.values()))
    chance = sum(len(r) ** 2 / sizes[n] for n, r in removed.items()) / total
    return Coverage(routed, without, _overlap(first, second), round(chance, DIGITS), asked)


def _routed(statistics: Statistics, removed: Mapping[str, Sequence[int]]) -> dict[str, float]:
    parts = {n: s[MASS] for n, s in statistics.sums.items() if n in removed and MASS in s}
    if not parts:
        return {}
    gone = sum(v[:, list(removed[n])].sum(1) for n, v in parts.items())
    every = sum(v.sum(1) for v in parts.values())
    assert isinstance(gone, Tensor)
    assert isinstance(every, Tensor)
    share = round_significant(gone / every.clamp(min=1e-300), DIGITS).tolist()
    return {d: s for d, s, e in zip(statistics.domains, share, every, strict=True) if e > 0}


def _without(
    statistics: Statistics, removed: Mapping[str, Sequence[int]], rule: Criterion,
    weights: Mapping[str, float] | None,
) -> dict[str, float]:  # fmt: skip
    counted = [d for d in statistics.domains if (weights or {}).get(d, 1.0) > 0]
    constant = [n in c for c in statistics.constants.values() for n in rule.needs]
    if not 2 <= len(counted) <= MOST or (constant and all(constant)):
        return {}
    needed = {
        n: {k: v for k, v in s.items() if k in rule.needs} for n, s in statistics.sums.items()
    }
    statistics = replace(statistics, sums=needed)
    every = _lowest(rule(statistics, weights), statistics.groups, removed)
    found = {}
    for domain in counted:
        try:
            fewer = rule(statistics, {**(weights or {}), domain: 0.0})
        except ValueError:  # a rule that compares domains, of which too few are left
            return {}
        found[domain] = _overlap(every, _lowest(fewer, statistics.groups, removed))
    return found


def _fisher(
    statistics: Statistics, weights: Mapping[str, float] | None
) -> list[dict[str, Tensor]] | None:
    """Scores by each half; None where one is empty. Of the second: the whole less the first."""
    rows = torch.tensor(domain_weights(statistics.domains, weights))[statistics.sequence_domains]
    first = in_first_half(statistics.sequence_ids)
    if not (rows[first] > 0).any() or not (rows[~first] > 0).any():
        return None
    sides: list[dict[str, Tensor]] = [{}, {}]
    for g in statistics.groups:
        kept = {k: v for k, v in statistics.sums[g.name].items() if k in (WHOLE, HALF)}
        view = replace(statistics, sums={g.name: kept}).view(g, weights)
        half = view[HALF]
        for side, values in zip(sides, (half, view[WHOLE].diagonal() - half), strict=True):
            side[g.name] = round_significant(values)
    return sides


def _taylor(
    statistics: Statistics, weights: Mapping[str, float] | None
) -> list[dict[str, Tensor]] | None:
    """The same by the rows; None where there are none."""
    rule = criteria()[TAYLOR]
    statistics = replace(statistics, sums={})  # a view sums whatever is there; these are rows
    views = {g: statistics.view(g, weights) for g in statistics.groups}
    if not views or any(len(v.rows) < 2 for v in views.values()):
        return None
    first = _every_other(statistics)
    sides = []
    for chosen in (first, ~first):
        halved = {g: replace(v, row_weights=v.row_weights * chosen) for g, v in views.items()}
        if not all(float(v.row_weights.sum()) for v in halved.values()):
            return None
        sides.append({g.name: round_significant(rule.score(v)) for g, v in halved.items()})
    return sides


def _every_other(statistics: Statistics) -> Tensor:
    """[S] whether a sequence is of the first half: every other one of each domain, by their ids."""
    first = torch.zeros(len(statistics.sequence_ids), dtype=torch.bool)
    order = torch.argsort(statistics.sequence_ids)
    for domain in range(len(statistics.domains)):
        first[order[statistics.sequence_domains[order] == domain][::2]] = True
    return first


def _lowest(
    scores: Scores, groups: tuple[UnitGroup, ...], removed: Mapping[str, Sequence[int]]
) -> dict[str, set[int]]:
    """As many units of each group as are removed, the lowest that routing allows to leave."""
    return {
        r.group.name: {*range(r.group.size)} - {*r.kept(len(removed[r.group.name]))}
        for r in rank(groups, scores, None)
    }


def _overlap(a: Mapping[str, set[int]], b: Mapping[str, set[int]]) -> float:
    both = sum(len(ids & b[n]) for n, ids in a.items())
    return round(both / sum(map(len, a.values())), DIGITS)
