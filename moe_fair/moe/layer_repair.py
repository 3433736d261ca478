"""What a repair did to a layer: the rows of `repair.json`."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class LayerRepair:
    """What was done to one layer.

    Attributes:
        name: the block.
        repair: name of the repair, or "none" where it did not help.
        ridge: the chosen regularisation.
        before, after: squared error of the fitted output relative to the target's square, on the
            held-out sequences, with the layer only cut, and repaired.
        epoch: of the distillation that followed, the epoch that was kept; 0 where none helped.
        tuned_before, tuned_after: error of the layer's output relative to what the layer adds to
            the residual stream, on the held-out sequences, before and after the distillation.
    """

    name: str
    repair: str
    ridge: float
    before: float
    after: float
    epoch: int = 0
    tuned_before: float = 0.0
    tuned_after: float = 0.0
