"""Checkpoints whose weights are packed: what their config says, and what of it is not admitted.

Scores need weights that multiply and have gradients, so they are unpacked as they are read
(`engines.packing`). The cut itself copies the packed bytes of the experts that stay, scales with
them; the result is packed as the original is.

A config does not always admit it. Weights that were scored unscaled would be wrong without a sign,
so they are refused.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from moe_fair.engines.packing import Packing
from moe_fair.engines.shards import StoredTensor
from moe_fair.moe.tensor_slicing import LAST_NUMBER

# data types that no weight has which can multiply as it is
CODES = ("F8_E4M3", "F8_E5M2", "F8_E8M0", "U8", "I8", "F4")
# what scale tensors of the packers are called
SCALES = (
    "scale", "scale_inv", "scales", "scale_2", "weight_scale", "weight_scale_inv", "input_scale",
    "qweight", "qzeros", "weight_packed", "weight_shape", "zero_point", "absmax",
)  # fmt: skip


def check_admitted(
    tensors: Sequence[StoredTensor], places: Mapping[str, str], packing: Packing | None
) -> None:
    """What is packed is packed as the config says.

    Args:
        tensors: of the checkpoint.
        places: name, as stored, -> in the model, of those that have a place there.
        packing: the weights that are, as the config says.

    Raises:
        ValueError: a tensor is packed in a way that nothing tells.
    """
    owned = packing.owners if packing else {}
    _check_alike(tensors, places, shapes=packing is not None)
    for t in tensors:
        if t.name in owned:
            continue
        if packing and t.name in places and t.dtype in CODES:
            raise ValueError(
                f"{t.name} ({t.dtype}) is of packed weights, and nothing lies beside it that says "
                f"how to unpack it as {packing.scheme.name}, which the config names; download or "
                "copy the checkpoint again"
            )
        in_codes = t.name in places and t.dtype in CODES and t.name.endswith("weight")
        scale = t.name not in places and t.name.rpartition(".")[2] in SCALES
        if not packing and (in_codes or scale):
            raise ValueError(
                f"{t.name} ({t.dtype}) is of packed weights, and config.json does not say how they "
                "are packed (no quantization_config); prune the original model, or copy what says "
                "it into config.json"
            )


def _check_alike(
    tensors: Sequence[StoredTensor], places: Mapping[str, str], *, shapes: bool
) -> None:
    """A layer's experts are all of one size on disk, on which the budget counts.

    Args:
        shapes: of packed weights, in which codes of fewer bits are as many less.
    """
    seen: dict[str, StoredTensor] = {}
    experts: dict[tuple[str, str], StoredTensor] = {}  # the same matrix of any expert
    for t in tensors:
        if t.name not in places:
            continue
        first = seen.setdefault(places[t.name], t)
        matrix = places[t.name], LAST_NUMBER.sub(r"\g<1>*\g<3>", t.name)
        other = experts.setdefault(matrix, t)
        if first.dtype != t.dtype or (shapes and other.shape != t.shape):
            first = first if first.dtype != t.dtype else other
            raise ValueError(
                f"{first.name} is {first.dtype} {list(first.shape)} and {t.name} {t.dtype} "
                f"{list(t.shape)}: a layer's experts of which some are packed, or packed "
                "otherwise, are not of one size; prune the original model and quantise the result"
            )
