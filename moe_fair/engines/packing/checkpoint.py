"""The packed weights of one checkpoint, each seen as one tensor that is unpacked when read."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from moe_fair.engines.packing.scheme import CODES, SCALE, PackedWeight, Scheme
from moe_fair.engines.shards import StoredTensor
from moe_fair.engines.stored_values import read_tensor

SEEN = 2**31  # bytes of scales that are looked at before anything is measured
CPU = torch.device("cpu")
# beside weights, of no weight: how activations and the cache are quantised where that is done
BESIDE = (
    ".input_scale", ".input_global_scale", ".input_zero_point", ".output_scale", ".k_scale",
    ".v_scale", ".q_scale", ".activation_scale", ".input_amax", ".bias_zero_point",
)  # fmt: skip


@dataclass(frozen=True)
class Packing:
    """A scheme, and which stored tensors are packed by it.

    Attributes:
        weights: by the names that they would have unpacked.
    """

    scheme: Scheme
    weights: Mapping[str, PackedWeight]

    @cached_property
    def owners(self) -> dict[str, PackedWeight]:
        """Stored name of every part -> its weight."""
        return {t.name: w for w in self.weights.values() for t in w.parts.values()}

    def owner_name(self, stored: str) -> str:
        """Name, unpacked, of the weight that a tensor is any part of, or of a plain tensor."""
        owner = self.owners.get(stored)
        return owner.name if owner else stored

    def weight_of(self, stored: str) -> str | None:
        """Name, unpacked, of the weight whose codes this tensor holds, or of a plain tensor.

        None for scales and whatever else only goes with a weight.
        """
        owner = self.owners.get(stored)
        if owner is not None:
            return owner.name if owner.parts[CODES].name == stored else None
        return None if stored.endswith(BESIDE) else stored

    def numel(self, t: StoredTensor) -> int:
        """Weights that a stored tensor stands for: a scale is none."""
        owner = self.owners.get(t.name)
        if owner is None:
            return 0 if t.name.endswith(BESIDE) else t.numel
        codes = owner.parts[CODES]
        return owner.numel * t.numel // codes.numel if codes.name == t.name else 0

    def unpacked(self, slices: Mapping[str, Any], device: torch.device = CPU) -> dict[str, Any]:
        """Slices of safetensors files, one lazy tensor in the place of every weight's parts.

        Args:
            device: that unpacks, once it has the packed bytes.
        """
        found: dict[str, Any] = {}
        for name, s in slices.items():
            owner = self.owners.get(name)
            if owner is None:
                if not name.endswith(BESIDE):
                    found[name] = s
            elif owner.name not in found:
                parts = {role: slices[t.name] for role, t in owner.parts.items()}
                found[owner.name] = LazyWeight(self.scheme, owner, parts, device)
        return found

    def pack(
        self, weight: PackedWeight, values: Tensor, like: Mapping[str, Tensor]
    ) -> dict[str, Tensor]:
        """Role -> tensor, of all parts; those that there are where they stand for these values.

        Args:
            like: as in `Scheme`; of the experts that stay, where one tensor is of several.
        """
        was = self.scheme.unpack(weight, like)
        if was.shape != values.shape:
            raise ValueError(
                f"{weight.name} {list(was.shape)}, unpacked, cannot become {list(values.shape)}"
            )
        if torch.equal(was.to(values.dtype), values):
            return dict(like)
        return {**like, **self.scheme.pack(weight, values, like)}

    def check_values(self, room: int = SEEN) -> None:
        """Scales are finite numbers; all of them, or as many as `room` bytes hold.

        Raises:
            ValueError: one is not.
        """
        for weight in self.weights.values():
            t = weight.parts[SCALE]
            room -= t.bytes
            if room < 0:
                return
            check_finite(weight, SCALE, read_tensor(t))


class LazyWeight:
    """A weight whose parts are read and unpacked when it is indexed, as a safetensors slice is."""

    def __init__(
        self,
        scheme: Scheme,
        weight: PackedWeight,
        parts: Mapping[str, Any],
        device: torch.device = CPU,
    ) -> None:
        self._scheme, self._weight, self._parts, self._device = scheme, weight, parts, device
        self._brought = False

    def brought(self) -> LazyWeight:
        """The same, its parts where they are unpacked: mapped from the file, or on the device.

        Raises:
            ValueError: a scale is no finite number.
        """
        found = LazyWeight(self._scheme, self._weight, self._read(), self._device)
        found._brought = True
        return found

    def __getitem__(self, index: Any) -> Tensor:
        parts = self._parts if self._brought else self._read()
        return self._scheme.unpack(self._weight, parts)[index]

    def _read(self) -> dict[str, Tensor]:
        parts = {role: s[...] for role, s in self._parts.items()}
        check_finite(self._weight, SCALE, parts[SCALE])  # here: a device would be waited for
        return {role: t.to(self._device) for role, t in parts.items()}

    def get_shape(self) -> list[int]:
        """Unpacked."""
        return list(self._weight.shape)

    def get_dtype(self) -> str:
        """In which it is unpacked."""
        return "F32"


def check_finite(weight: PackedWeight, role: str, values: Tensor) -> None:
    """Scales are numbers.

    Raises:
        ValueError: one is not.
    """
    if values.is_floating_point() and not bool(values.float().isfinite().all()):
        raise ValueError(
            f"{weight.parts[role].name} holds what is no finite number, so {weight.name} has no "
            "values; download or copy the checkpoint again"
        )


def find_packing(scheme: Scheme, tensors: Sequence[StoredTensor]) -> Packing:
    """A checkpoint's packed weights, all their headers checked.

    Raises:
        ValueError: see `Scheme.find`; or nothing is packed as the config says.
    """
    weights = {w.name: w for w in scheme.find(tensors)}
    if not weights:
        raise ValueError(
            f"the config says that weights are packed ({scheme.name}), and no tensor is: the "
            "config and the tensors contradict each other"
        )
    return Packing(scheme, weights)
