"""From a tensor's name in the checkpoint to its name in the model.

Hub checkpoints keep one matrix per expert under a family's own names, models of transformers 5 keep
one fused tensor; transformers' conversion mapping knows both. This is the one place that calls it.
"""

from __future__ import annotations

from collections.abc import Callable

from torch import nn
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import WeightConverter, rename_source_key


def model_names(skeleton: nn.Module) -> Callable[[str], str]:
    """A function from checkpoint names to names in `skeleton.state_dict()`."""
    transforms = get_model_conversion_mapping(skeleton)
    converters = [t for t in transforms if isinstance(t, WeightConverter)]
    renamings = [t for t in transforms if not isinstance(t, WeightConverter)]
    state = skeleton.state_dict()

    def name(stored: str) -> str:
        renamed, _ = rename_source_key(
            stored, renamings, converters, skeleton.base_model_prefix, state
        )
        return renamed

    return name
