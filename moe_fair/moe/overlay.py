"""Repaired or merged tensors in the place of a checkpoint's own, byte range by byte range.

Repairs and merging leave one safetensors file a layer, with tensors named as in the model. Where a
checkpoint keeps one matrix per expert, or gate and up apart, the ranges are those of that matrix.
The file also keeps an original tensor of every kind that was changed; a checkpoint whose bytes are
not those has another layout, and nothing is written. Packed weights are packed again, each matrix
by itself (see `repacking`), or were packed when the repair was judged.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from moe_fair.core.output import fresh
from moe_fair.engines.names import Destination
from moe_fair.engines.shards import Piece, StoredTensor, stored_tensors
from moe_fair.moe.blocks import MoeBlock
from moe_fair.moe.checkpoint_source import Checkpoint
from moe_fair.moe.repacking import PACKED, Repacking
from moe_fair.moe.tensor_slicing import ExpertTensor, cut_tensors

ORIGINAL = "original: "  # name, in a repair's file, of what a tensor was: of the first kept expert
TYPES = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16,
}  # fmt: skip


def layer_file(folder: Path, block: MoeBlock) -> Path:
    """Where what changed in a block's layer lies."""
    return folder / f"layer-{block.layer:05d}.safetensors"


def original_tensors(block: MoeBlock, expert: int) -> dict[str, Tensor]:
    """Name in the model -> the original tensor, of one expert where it has an expert axis."""
    size = block.num_experts
    axes = {id(getattr(m, t)) for m, t, dim in block.tensors() if dim == 0}
    found = {}
    for name, p in block.block.named_parameters():
        t = p.detach()
        if id(p) in axes:
            width = len(t) // size
            t = t[expert * width : (expert + 1) * width]
        found[f"{block.name}.{name}"] = t.cpu().clone()
    return found


class UnknownLayoutError(ValueError):
    """The checkpoint keeps a tensor in a layout that new values cannot be written in."""


def check_layouts(source: Checkpoint) -> None:
    """What repairs or merging change can be written as the checkpoint keeps it, by its headers.

    Raises:
        UnknownLayoutError: some tensor cannot.
    """
    find = source.find
    homes = tuple(f"{b.name}." for b in source.blocks)
    state = dict(source.skeleton.named_parameters())  # buffers are never changed
    for t in source.tensors:
        owner = source.packing.owners.get(t.name) if source.packing else None
        where = find(owner.name if owner else t.name)
        if where.name not in state or not where.name.startswith(homes):
            continue
        if owner is not None:
            if where.operations or not (where.one or where.part is not None):
                raise UnknownLayoutError(
                    f"{t.name} is of a packed weight that is changed on loading, in which no new "
                    "values are written; use --repair none and --reduce prune"
                )
            continue
        if t.dtype not in TYPES:
            raise UnknownLayoutError(f"{t.name} is {t.dtype}, in which no new values are written")
        if where.part is None:
            try:
                where.stored(state[where.name], t.shape)
            except ValueError as e:
                raise UnknownLayoutError(f"{e}; use --repair none and --reduce prune") from e


def with_changes(
    source: Checkpoint,
    kept: Mapping[str, Sequence[int]],
    folders: Sequence[Path],
    repacking: Repacking | None = None,
) -> Iterator[StoredTensor]:
    """The tensors of the pruned checkpoint, with those that merging and repairs changed.

    Args:
        folders: where the changed ones lie; what several have is the last one's.
        repacking: its packed weights, where there are some.

    Raises:
        UnknownLayoutError: a changed tensor whose layout in the checkpoint is unknown.
    """
    find = source.find
    stored = {find(t.name).name: t for t in source.tensors}
    new: dict[str, StoredTensor] = {}
    originals: dict[str, Tensor] = {}
    packed: dict[str, StoredTensor] = {}  # name in the result -> the tensor
    written = {folder: fresh(folder / "stored") for folder in folders}
    for file in (f for folder in folders for f in sorted(folder.glob("layer-*.safetensors"))):
        into = written[file.parent]
        with safe_open(file, framework="pt") as f:
            names = [n for n in f.keys() if n.startswith(ORIGINAL)]  # noqa: SIM118
            originals |= {n.removeprefix(ORIGINAL): f.get_tensor(n) for n in names}
        if repacking is not None:
            again = _packed(file, repacking, originals, into / f"packed-{file.name}")
            packed |= {t.name: t for t in again}
        plain = _as_stored(file, stored, find, repacking)
        save_file(plain, into / file.name)
        new |= {t.name: t for t in stored_tensors(into / file.name)}
    converts = repacking is not None and repacking.conversion is not None
    for t in source.tensors:
        where, part = find(t.name), source.parts.get(t.name)
        for cut in cut_tensors([t], source.parts, kept):
            if converts:
                assert repacking is not None
                if where.name not in new:
                    yield from repacking.converted(cut, packed)
                    continue
            elif cut.name in packed:
                instead = packed[cut.name]
                assert (instead.dtype, instead.shape) == (cut.dtype, cut.shape), cut.name
                yield instead
                continue
            if where.name not in new:
                yield cut
                continue
            place = None
            if part is not None and part.expert is not None:
                place = list(kept[part.block]).index(part.expert)
            if place in (None, 0):
                first = kept[part.block][0] if part is not None else 0
                _check_layout(t, where, part, first, originals[where.name])
            changed = _range(new[where.name], cut, where, place)
            if converts:
                assert repacking is not None
                yield from repacking.converted(changed, packed)
            else:
                yield changed


def _range(
    new: StoredTensor, cut: StoredTensor, where: Destination, place: int | None
) -> StoredTensor:
    """The bytes of `new` that stand for the tensor `cut`."""
    if place is not None:
        [piece] = new.take([place]).pieces
        size = piece.length // where.parts
        new = StoredTensor(
            cut.name, new.dtype, cut.shape,
            (Piece(piece.file, piece.start + size * (where.part or 0), size),),
        )  # fmt: skip
    if (new.dtype, new.shape, new.bytes) != (cut.dtype, cut.shape, cut.bytes):
        raise UnknownLayoutError(_unknown(cut.name))
    return new.renamed(cut.name)


def _check_layout(
    t: StoredTensor, where: Destination, part: ExpertTensor | None, first: int, original: Tensor
) -> None:
    """The checkpoint's own bytes are what the model had where the repair changed it."""
    with safe_open(t.pieces[0].file, framework="pt") as f:
        if part is not None and part.expert is None and part.dim == 0:
            width = t.shape[0] // part.experts
            stored = f.get_slice(t.name)[first * width : (first + 1) * width]
        elif part is not None and part.expert is None:
            return  # a router's [1, E]: its shape leaves no other layout
        else:
            stored = f.get_tensor(t.name)
    if where.part is not None and where.parts > 1:
        original = original[0].chunk(where.parts)[where.part]  # of one expert's rows
    if where.part is None and where.operations:
        original = where.stored(original, stored.shape)
    stored = stored.reshape(-1).to(original.dtype)
    if stored.numel() != original.numel() or not torch.equal(stored, original.reshape(-1)):
        raise UnknownLayoutError(_unknown(t.name))


def _unknown(name: str) -> str:
    return (
        f"{name}: the checkpoint keeps it in another layout than the model, so the new values "
        "cannot be written; use --repair none and --reduce prune"
    )


def _packed(
    file: Path, repacking: Repacking, originals: Mapping[str, Tensor], into: Path
) -> list[StoredTensor]:
    """Of one layer's new tensors those that are stored packed, named as in the result.

    Args:
        into: a new file for merged ones; what a repair changed was packed when it was judged.

    Raises:
        UnknownLayoutError: the checkpoint's own bytes are not what the model had there.
    """
    ready = [t for t in stored_tensors(file) if t.name.startswith(PACKED)]
    found: dict[str, Tensor] = {}
    with safe_open(file, framework="pt") as f:
        for name in sorted(n for n in f.keys() if n in repacking):  # noqa: SIM118
            if not repacking.is_of(name, originals[name]):
                raise UnknownLayoutError(_unknown(name))
            if not ready:
                found |= repacking.pack(name, f.get_tensor(name))[1]
    if ready:
        return [t.renamed(t.name.removeprefix(PACKED)) for t in ready]
    save_file(found, into)
    return stored_tensors(into)


def _as_stored(
    file: Path,
    stored: Mapping[str, StoredTensor],
    find: Callable[[str], Destination],
    repacking: Repacking | None,
) -> dict[str, Tensor]:
    """One layer's new tensors by their names in the model, as the checkpoint keeps such tensors."""
    found = {}
    with safe_open(file, framework="pt") as f:
        for name in f.keys():  # noqa: SIM118
            if name.startswith((ORIGINAL, PACKED)) or (repacking and name in repacking):
                continue
            t = stored[name]
            tensor, where = f.get_tensor(name), find(t.name)
            tensor = tensor.to(TYPES.get(t.dtype, tensor.dtype))
            if where.part is None:
                tensor = where.stored(tensor, _cut_shape(t, tensor, where))
            found[name] = tensor
    return found


def _cut_shape(t: StoredTensor, tensor: Tensor, where: Destination) -> tuple[int, ...]:
    """The shape in which the checkpoint would keep a tensor with fewer experts."""
    if len(t.shape) == len(tensor.shape) and not where.operations:
        return tuple(tensor.shape)
    return (len(tensor), *t.shape[1:])
