"""NAEE-style reconstruction: the set of units whose joint absence changes a group's output least.

With v_e(t) what unit e adds to the group's output for token t, and the Gram matrix
G_ef = Σ_t ⟨v_e(t), v_f(t)⟩, leaving out a set S changes the output by

    F(S) = Σ_t ‖Σ_{e∈S} v_e(t)‖² = Σ_{e,f∈S} G_ef

so that no set needs another run of the model. Every group gives the same number of units; which,
is found by trying all C(N, r) sets where there are at most `MOST_SETS`, else greedily: each time
the unit that adds least to F.

After NAEE (arXiv 2402.14800), which tries all sets of Mixtral's 8 experts layer by layer, with
uniform counts. There each set is run with its router choosing again among the rest, and the norms
of the batches' changes are added up; here what is left out goes missing and nothing takes its
place. The Gram matrix is what makes large N possible: C(60, 20) sets cannot be run.

Shape legend: N units of a group, r of them removed, Q sets.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import combinations
from math import comb

import numpy as np

from moe_fair.core.allocate import uniform
from moe_fair.core.greedy import greedy
from moe_fair.core.ranking import RankedGroup
from moe_fair.core.units import Budget

name = "naee"
needs_protection = False
# [N, N] sums over tokens of products of what two units add to the output
inputs = {"gram": lambda view: view["gated_gram"].numpy()}
needs = ("gated_gram",)
removal = "naee"  # the greedy order of a single group: the one removal score that goes with it
MOST_SETS = 20_000


def allocate(
    ranked: Sequence[RankedGroup], remove: int | None = None, tolerance: float | None = None
) -> Budget:
    """Uniform counts, and in each group the set of that size with the least F that was found.

    Raises:
        ValueError: no Gram matrix, a tolerance instead of a total, or a total that cannot be met.
    """
    grams = [r.inputs["gram"] for r in ranked if "gram" in r.inputs]
    if len(grams) < len(ranked):
        raise ValueError("--allocate naee needs the Gram matrix of gated outputs and got none")
    kept = uniform.allocate(ranked, remove, tolerance).kept
    orders, errors, searches = {}, {}, {}
    for r, gram in zip(ranked, grams, strict=True):
        group = r.group
        count = group.size - kept[group.name]
        order, _ = greedy(gram, group.blocks)
        small = group.blocks == 1 and comb(group.size, count) <= MOST_SETS
        gone = exhaustive(gram, count) if small else order[:count]
        orders[group.name] = np.array(gone + [e for e in order if e not in set(gone)])
        total = float(gram.sum())
        errors[group.name] = error(gram, gone) / total if total > 0 else 0.0
        searches[group.name] = "exhaustive" if small else "greedy"
    return Budget(kept, name, {"relative_error": errors, "search": searches}, orders)


def error(gram: np.ndarray, gone: Sequence[int]) -> float:
    """F of a set."""
    return float(gram[np.ix_(gone, gone)].sum())


def exhaustive(gram: np.ndarray, count: int) -> list[int]:
    """The set of `count` units with the least F; of equals the first in the order of ids."""
    sets = np.array(list(combinations(range(len(gram)), count)), dtype=np.int64)
    chosen = np.zeros((len(sets), len(gram)))  # [Q, N]
    np.put_along_axis(chosen, sets, 1.0, axis=1)
    return [int(e) for e in sets[int(np.argmin(((chosen @ gram) * chosen).sum(1)))]]
