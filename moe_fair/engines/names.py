"""From a tensor's name in the checkpoint to its place in the model.

Hub checkpoints keep one matrix per expert under a family's own names, models of transformers 5 keep
one fused tensor; transformers' conversion mapping knows both. This is the one place that reads it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache

from torch import Tensor, nn
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import (
    Concatenate,
    ConversionOps,
    Interleave,
    MergeModulelist,
    Transpose,
    WeightConverter,
    rename_source_key,
)


@dataclass(frozen=True)
class Destination:
    """Where a stored tensor goes.

    Attributes:
        name: in `model.state_dict()`.
        part, parts: for one expert's matrix of a fused tensor that is a plain stack of experts
            (with gate and up side by side): which part of its expert's rows this is, of how many.
            None where the conversion is another one, or none.
        operations: what loading does to a tensor that is converted by itself.
        one: it is, or is only renamed; not so where several become one, or one becomes several.
    """

    name: str
    part: int | None = None
    parts: int = 1
    operations: tuple[ConversionOps, ...] = ()
    one: bool = True

    def stored(self, tensor: Tensor, shape: Sequence[int]) -> Tensor:
        """A tensor of the model as the checkpoint keeps it: the inverse of what loading does.

        Args:
            shape: as it is stored.

        Raises:
            ValueError: loading does what has no known inverse.
        """
        for op in reversed(self.operations):
            if isinstance(op, Transpose):
                if not op.check_dims or tuple(tensor.shape) != tuple(shape):
                    tensor = tensor.transpose(op.dim0, op.dim1)
            elif isinstance(op, Interleave):
                [tensor] = op.reverse_op.convert({"": tensor}, [""], [""]).values()
            else:
                raise ValueError(f"{self.name}: no inverse of {type(op).__name__} is known")
        if not self.one or tuple(tensor.shape) != tuple(shape):
            raise ValueError(
                f"{self.name} {list(tensor.shape)}: the checkpoint keeps it as {list(shape)}, in a "
                "layout that new values cannot be written in"
            )
        return tensor.contiguous()


def destinations(skeleton: nn.Module) -> Callable[[str], Destination]:
    """A function from names in the checkpoint to places in the model."""
    transforms = get_model_conversion_mapping(skeleton)
    converters = [t for t in transforms if isinstance(t, WeightConverter)]
    renamings = [t for t in transforms if not isinstance(t, WeightConverter)]
    single = {
        c.source_patterns[0]: tuple(c.operations)
        for c in converters
        if len(c.source_patterns) == len(c.target_patterns) == 1
    }
    stacked = {
        pattern: (i, len(c.source_patterns))
        for c in converters
        if _is_plain_stack(c)
        for i, pattern in enumerate(c.source_patterns)
    }
    state = skeleton.state_dict()

    @cache  # asked several times of each tensor
    def find(stored: str) -> Destination:
        renamed, pattern = rename_source_key(
            stored, renamings, converters, skeleton.base_model_prefix, state
        )
        if renamed not in state and stored in state:
            renamed, pattern = stored, None
        part, parts = stacked.get(pattern, (None, 1))
        if part is not None:
            return Destination(renamed, part, parts)
        one = pattern is None or pattern in single
        return Destination(renamed, operations=single.get(pattern, ()), one=one)

    return find


def _is_plain_stack(converter: WeightConverter) -> bool:
    """Experts stacked on axis 0, and the parts of one expert joined on its rows."""
    operations = converter.operations
    kinds = [type(o) for o in operations]
    if kinds not in ([MergeModulelist], [MergeModulelist, Concatenate]):
        return False
    several = len(converter.source_patterns) > 1
    return (
        [o.dim for o in operations] == ([0, 1] if len(operations) == 2 else [0])
        and several == (len(operations) == 2)
        and len(converter.target_patterns) == 1
    )
