"""How many tokens that a head for multi-token prediction drafts are accepted."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Drafts:
    """Tokens drafted on a text, and of these accepted: what the model itself ranks first there.

    It is the acceptance of greedy decoding with every context taken from the text.
    """

    drafted: int
    accepted: int

    @property
    def rate(self) -> float:
        """The share accepted; 0 where none was drafted."""
        return self.accepted / self.drafted if self.drafted else 0.0
