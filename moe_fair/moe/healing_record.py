"""What healing did to a pruned model: `heal.json`."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Judged:
    """Means over a domain's held-back tokens, in nats: next-token loss, KL from the original."""

    loss: float
    kl: float


@dataclass(frozen=True)
class Healing:
    """Before and after, on held-back sequences.

    Attributes:
        tokens, steps: that were read and taken, up to the look that counts.
        refused: why nothing of it was kept; empty where it was.
        before, after: by domain, what was judged with the repaired and with the healed weights;
            `after` of the best that training came to.
        agreement: before and after, share of the original's greedy text that is ranked first; None
            where it was not asked for any more.
        repetition: the same of repeated 4-grams in greedy text; the original's stands first.
    """

    tokens: int
    steps: int
    refused: str
    before: dict[str, Judged]
    after: dict[str, Judged]
    agreement: tuple[float, float] | None = None
    repetition: tuple[float, float, float] | None = None
