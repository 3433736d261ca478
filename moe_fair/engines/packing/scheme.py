"""What a packing is: how a weight's numbers lie in several stored tensors, and back.

One file a scheme. A scheme finds its weights among a checkpoint's tensors by their names, says what
contradicts it, and turns a weight's tensors into numbers and new numbers into tensors.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from moe_fair.engines.shards import StoredTensor

CODES, SCALE, ZERO = "codes", "scale", "zero point"  # roles that most schemes have
FLOATS = ("F64", "F32", "F16", "BF16")
FP8_LARGEST = 448.0  # of float8_e4m3fn
# below 8 bits: what of a group's largest number is tried as what becomes its largest code, since
# cutting it off may come nearer to the others
SHARES = (1.0, 0.95, 0.9, 0.85, 0.8, 0.75)


@dataclass(frozen=True)
class PackedWeight:
    """A weight that is stored as several tensors.

    Attributes:
        name: what the checkpoint would call it, were it not packed.
        shape: that it then had, by the headers.
        parts: role -> stored tensor; `codes` is the one that holds a number for every weight.
    """

    name: str
    shape: tuple[int, ...]
    parts: Mapping[str, StoredTensor]

    @property
    def numel(self) -> int:
        """Its number of weights."""
        return torch.Size(self.shape).numel()


class Scheme(Protocol):
    """One way of packing.

    Attributes:
        name: as its publishers call it.
    """

    name: str

    def find(self, tensors: Sequence[StoredTensor]) -> list[PackedWeight]:
        """The packed weights of a checkpoint, by its headers.

        Raises:
            ValueError: a part is missing, or contradicts the others or the config.
        """
        ...

    def unpack(self, weight: PackedWeight, parts: Mapping[str, Tensor]) -> Tensor:
        """The weight in float32; in bfloat16 where that is exact."""
        ...

    def pack(
        self, weight: PackedWeight, values: Tensor, like: Mapping[str, Tensor]
    ) -> dict[str, Tensor]:
        """Role -> tensor, of those that change, with new values.

        Args:
            like: the tensors as they were, whose data types and arrangement stay.
        """
        ...


def gather(
    tensors: Iterable[StoredTensor],
    roles: Mapping[str, str],
    needed: Sequence[str],
    ending: str = "",
) -> dict[str, dict[str, StoredTensor]]:
    """Name of a weight -> role -> tensor, of every weight of which any part but the codes is there.

    Args:
        roles: role -> how such a tensor's name ends, where the weight's would end in `ending`.
        needed: roles that no weight can do without.

    Raises:
        ValueError: a needed part is missing, or holds nothing.
    """
    by_name = {t.name: t for t in tensors}
    own = {role: end for role, end in roles.items() if end != ending}
    found: dict[str, dict[str, StoredTensor]] = {}
    for name, t in by_name.items():
        for role, end in own.items():
            if name.endswith(end):
                found.setdefault(name.removesuffix(end) + ending, {})[role] = t
    for weight, parts in found.items():
        if roles[CODES] == ending and weight in by_name:
            parts[CODES] = by_name[weight]
        for role in needed:
            if role not in parts:
                lacks = weight.removesuffix(ending) + roles[role]
                there = next(iter(parts.values())).name
                raise ValueError(
                    f"{there} is of a packed weight, and {lacks} ({role}) is missing; download or "
                    "copy the checkpoint again"
                )
    for parts in found.values():
        for t in parts.values():
            if 0 in t.shape:
                raise ValueError(f"{t.name} {list(t.shape)} holds nothing; download it again")
    return found


def expect(t: StoredTensor, dtypes: Sequence[str], shape: Sequence[int], why: str) -> None:
    """A part is of one of these data types and of this shape.

    Raises:
        ValueError: it is not; says what the scheme wants.
    """
    if t.dtype not in dtypes:
        raise ValueError(f"{t.name} is {t.dtype}; {why} wants {' or '.join(dtypes)} there")
    if tuple(t.shape) != tuple(shape):
        raise ValueError(
            f"{t.name} is {list(t.shape)}; {why} wants {list(shape)} for "
            "these codes; the config and the tensors contradict each other"
        )
