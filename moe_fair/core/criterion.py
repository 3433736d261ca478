"""A criterion: a rule that turns statistics into one score per unit; higher = keep."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from moe_fair.core.units import Scores, Statistics

# Scores are compared after rounding to this many significant digits, so that the order in which
# processes or devices added their sums cannot change a plan.
SIGNIFICANT_DIGITS = 8


@dataclass(frozen=True)
class Criterion:
    """A named scoring rule.

    Attributes:
        name: what the user types.
        needs: statistics that must have been collected.
        source: the paper, or "this project".
        score: GroupView -> [N]; higher = keep. A unit that no token reached scores as removable.
        of: other criteria by which it goes. With them `score` is asked once: their scores of the
            units of all groups, [C, U] -> [U].
    """

    name: str
    needs: tuple[str, ...]
    source: str
    score: Callable[..., Tensor]
    of: tuple[Criterion, ...] = ()

    def __call__(
        self, statistics: Statistics, weights: Mapping[str, float] | None = None
    ) -> Scores:
        """Scores of every group.

        Raises:
            ValueError: a statistic that the rule needs was not collected, or a score is not finite.
        """
        if self.of:
            return self._over_all(statistics, weights)
        values = {}
        for group in statistics.groups:
            view = statistics.view(group, weights)
            missing = [n for n in self.needs if n not in view]
            if missing:
                raise ValueError(
                    f"criterion {self.name!r} needs {', '.join(missing)}, which these statistics "
                    f"do not hold; collect it with `moe-fair calibrate --for {self.name}`"
                )
            score = self.score(view).to(torch.float64)
            assert score.shape == (group.size,), (self.name, score.shape, group.size)
            bad = (~torch.isfinite(score)).nonzero().flatten().tolist()
            if bad:
                raise ValueError(
                    f"criterion {self.name!r} gives {score[bad[0]].item()} for unit {bad[0]} of "
                    f"{group.name} ({len(bad)} such units): the calibration run met NaN or Inf"
                )
            values[group.name] = round_significant(score)
        return Scores(self.name, values)

    def _over_all(self, statistics: Statistics, weights: Mapping[str, float] | None) -> Scores:
        found = [c(statistics, weights).values for c in self.of]
        names = [g.name for g in statistics.groups]
        scores = self.score(torch.stack([torch.cat([v[n] for n in names]) for v in found]))
        parts = scores.split([g.size for g in statistics.groups])
        return Scores(
            self.name, {n: round_significant(p) for n, p in zip(names, parts, strict=True)}
        )


def round_significant(x: Tensor, digits: int = SIGNIFICANT_DIGITS) -> Tensor:
    """`x` rounded to so many significant decimal digits, elementwise; 0 stays 0."""
    flat = [float(f"{v:.{digits - 1}e}") for v in x.flatten().tolist()]
    return torch.tensor(flat, dtype=torch.float64).reshape(x.shape)


def mean_over_tokens(total: Tensor, tokens: Tensor) -> Tensor:
    """`total / tokens` for units that saw a token, 0 for those that saw none. Shapes [N]."""
    return torch.where(tokens > 0, total / tokens.clamp(min=1e-300), torch.zeros_like(total))
