"""What a model is worth: held-out loss, agreement with the original, and benchmarks.

`benchmark` runs lm-eval, which takes seconds to import: it is imported where it is used.
"""

from moe_fair.evaluate.agreement import Agreement, Agreements, agreement
from moe_fair.evaluate.heldout import HeldoutLoss, heldout_loss

__all__ = ["Agreement", "Agreements", "HeldoutLoss", "agreement", "heldout_loss"]
