"""`refit`, then the layer's MoE block trained toward the original layer's output.

Router, experts and shared experts take part; the gradient stays within the layer (see
`moe.layer_distillation`).
"""

from __future__ import annotations

from moe_fair.moe.repairs.refit import fit as fit
from moe_fair.moe.repairs.refit import path as path
from moe_fair.moe.repairs.refit import ridges as ridges

name = "distill"
trains = True
wants_text = True
