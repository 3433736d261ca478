"""New values of packed weights: packed as the checkpoint packs them, and judged as they then are.

A repair or a merge changes tensors of the model. Where the checkpoint keeps such a tensor packed,
each of its matrices is packed again by its own scheme; a matrix that did not change keeps its
bytes. Packing rounds, to four bits in the worst case, so a repaired layer is judged once more as it
will be stored: one that is no better than the layer only cut is left as it was cut.

Where the result is stored otherwise than the checkpoint (see `conversion`), every matrix becomes
what it shall be there, changed or not, while the result is written.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import Tensor, nn

from moe_fair.engines.names import Destination
from moe_fair.engines.packing import PackedWeight
from moe_fair.engines.packing.checkpoint import check_finite
from moe_fair.engines.packing.experts import held
from moe_fair.engines.packing.scheme import CODES, SCALE
from moe_fair.engines.shards import MadeTensor, StoredTensor
from moe_fair.engines.stored_values import read_tensor
from moe_fair.moe.blocks import MoeBlock
from moe_fair.moe.checkpoint_source import Checkpoint
from moe_fair.moe.conversion import Conversion
from moe_fair.moe.layer_examples import Kinds
from moe_fair.moe.layer_repair import LayerRepair
from moe_fair.moe.tensor_slicing import LAST_NUMBER, cut_tensors

PACKED = "packed: "  # name, in a repair's file, of a tensor as the result will store it


@dataclass(frozen=True)
class _Matrix:
    """A weight within a tensor of the model that is packed, before or after.

    Attributes:
        parts: role -> stored tensor, as it is after the cut.
        place: number of the expert that it is of, after the cut; None where it is the whole tensor.
        becomes: what is stored in its place; None where that is what it was.
    """

    weight: PackedWeight
    where: Destination
    parts: Mapping[str, StoredTensor]
    place: int | None
    becomes: PackedWeight | None

    def of(self, tensor: Tensor) -> Tensor:
        """What of the tensor of the model it is."""
        if self.place is None:
            return tensor
        return tensor[self.place].chunk(self.where.parts)[self.where.part or 0]

    def read(self) -> dict[str, Tensor]:
        """Role -> tensor."""
        return {role: read_tensor(t) for role, t in self.parts.items()}

    @property
    def stored(self) -> Mapping[str, StoredTensor]:
        """Role -> what it is in the result, or will be."""
        return self.parts if self.becomes is None else self.becomes.parts


class Repacking:
    """The packed weights of a result, by the tensors of the model that they make.

    Args:
        source: a checkpoint with packed weights, where they stay as they are.
        kept: block name -> ids that stay.
        conversion: what they become otherwise.
        left_out: names of tensors that are then not converted either, but leave.
    """

    def __init__(
        self,
        source: Checkpoint,
        kept: Mapping[str, Sequence[int]],
        conversion: Conversion | None = None,
        left_out: Collection[str] = (),
    ) -> None:
        self.packing, self.conversion = source.packing, conversion
        self.left_out = left_out
        assert self.packing is not None or conversion is not None
        weights = self.packing.weights if self.packing else {}
        self._matrices: dict[str, list[_Matrix]] = {}
        self._owners: dict[str, _Matrix] = {}  # name in the result, were it stored as before
        for weight in (weights if conversion is None else conversion.weights).values():
            where = source.find(weight.name)
            parts = {
                role: cut
                for role, t in weight.parts.items()
                for cut in cut_tensors([t], source.parts, kept)
            }
            if not parts:  # its expert left
                continue
            own = source.parts.get(weight.parts[CODES].name)
            place, name, count = None, weight.name, None
            if own is not None and own.block in kept:
                ids = list(kept[own.block])
                if own.expert is None:
                    count = len(ids)
                else:
                    place = ids.index(own.expert)
                    name = LAST_NUMBER.sub(rf"\g<1>{place}\g<3>", name)
            elif own is not None:
                place = own.expert
            becomes = None
            if conversion is not None:
                shape = weight.shape if count is None else (count, *weight.shape[1:])
                becomes = conversion.becomes(weight, name, shape)
            matrix = _Matrix(weight, where, parts, place, becomes)
            self._matrices.setdefault(where.name, []).append(matrix)
            self._owners |= {t.name: matrix for t in parts.values()}

    def __contains__(self, name: str) -> bool:
        """A tensor of the model is packed, or some of it is."""
        return name in self._matrices

    def pack(self, name: str, values: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """A tensor of the model as the result will hold it.

        Args:
            values: with the experts that stay.

        Returns:
            the values that it then has, in the same data type; name in the result -> tensor.
        """
        near = values.detach().cpu().clone()
        stored: dict[str, Tensor] = {}
        for m in self._matrices[name]:
            new = self._pack(m, m.of(near))
            m.of(near).copy_(self._unpack(m, new))
            stored |= {m.stored[role].name: t.contiguous() for role, t in new.items()}
        return near.to(values.device), stored

    def round(self, block: MoeBlock) -> None:
        """Give a block that was cut the values that the result will hold, where they become others.

        A repair then starts from them, and has to better them.
        """
        if self.conversion is None or self.conversion.target.scheme is None:
            return
        for n, p in block.block.named_parameters():
            if (name := f"{block.name}.{n}") in self:
                p.data.copy_(self.pack(name, p)[0])

    def is_of(self, name: str, original: Tensor) -> bool:
        """The first matrices of a tensor are, unpacked, what the model had.

        Args:
            original: of the first expert that stays, where they are experts'.
        """
        for m in self._matrices[name]:
            if m.place in (None, 0):
                found = self._values(m, m.read()).to(original.dtype)
                wanted = m.of(original)
                if not torch.equal(found[: len(wanted)].reshape(-1), wanted.reshape(-1)):
                    return False
        return True

    def converted(
        self, cut: StoredTensor, ready: Mapping[str, StoredTensor]
    ) -> Iterator[StoredTensor]:
        """What is stored in the place of a tensor, of a result that is stored otherwise.

        Args:
            cut: as it would be stored.
            ready: by name, of weights that a repair has changed.
        """
        assert self.conversion is not None
        if cut.name in self.left_out:
            return
        m = self._owners.get(cut.name)
        if m is not None:  # the codes stand for all parts of it
            if m.parts[CODES].name != cut.name:
                return
            if m.stored[CODES].name in ready:
                yield from (ready[t.name] for t in m.stored.values())
                return
            made: dict[str, Tensor] = {}  # of one packing each part is taken once
            for role, t in m.stored.items():
                yield _made(t, partial(self._part, m, role, made))
        elif self.conversion.narrows(cut):
            yield _made(replace(cut, dtype="BF16"), partial(_narrow, cut))
        elif not self.conversion.drops(cut):
            yield cut

    def all_converted(self, cuts: Iterable[StoredTensor]) -> Iterator[StoredTensor]:
        """The same of all tensors, none of which a repair has changed."""
        return (new for cut in cuts for new in self.converted(cut, {}))

    def plain(self, cuts: Iterable[StoredTensor]) -> Iterator[StoredTensor]:
        """Of a result that is stored otherwise what is not packed, of all that would be stored."""
        by_codes = {t.name for m in self._packed() for t in m.stored.values()}
        return (t for t in self.all_converted(cuts) if t.name not in by_codes)

    def _packed(self) -> Iterator[_Matrix]:
        every = (m for matrices in self._matrices.values() for m in matrices)
        return (m for m in every if len(m.stored) > 1)

    def _part(self, m: _Matrix, role: str, made: dict[str, Tensor]) -> Iterator[Tensor]:
        """A part of a weight that no repair has changed, unpacked and packed as it shall be."""
        assert m.becomes is not None
        parts = m.read()
        if SCALE in parts:
            check_finite(m.weight, SCALE, parts[SCALE])
        if len(m.becomes.shape) > 2:  # all experts of a layer: one at a time is unpacked
            for i in range(m.becomes.shape[0]):
                yield self._values(m, {r: t[i : i + 1] for r, t in parts.items()}).bfloat16()
            return
        if role not in made:
            made |= self._pack(m, self._values(m, parts))
        yield made.pop(role)

    def _values(self, m: _Matrix, parts: Mapping[str, Tensor]) -> Tensor:
        """The numbers that a weight has as it is."""
        if self.packing is not None and m.weight.name in self.packing.weights:
            return self.packing.scheme.unpack(m.weight, parts)
        return parts[CODES]

    def _pack(self, m: _Matrix, values: Tensor) -> dict[str, Tensor]:
        if m.becomes is None:
            assert self.packing is not None
            return self.packing.pack(m.weight, values, m.read())
        assert self.conversion is not None
        return self.conversion.pack(m.becomes, values)

    def _unpack(self, m: _Matrix, parts: Mapping[str, Tensor]) -> Tensor:
        if m.becomes is None:
            return self._values(m, parts)
        assert self.conversion is not None
        return self.conversion.unpack(m.becomes, parts)


def _made(t: StoredTensor, make: Callable[[], Iterable[Tensor]]) -> MadeTensor:
    """A tensor of the result whose values are computed while it is written."""

    def data() -> Iterator[bytes]:
        for x in make():
            yield x.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()

    return MadeTensor(t.name, t.dtype, t.shape, (), data)


def _narrow(t: StoredTensor) -> Iterator[Tensor]:
    yield read_tensor(t).bfloat16()


class StoredLayer:
    """One layer's repair, judged as it will be stored.

    Args:
        kinds: which tokens judge; where none does, those that teach have to.
    """

    def __init__(self, repacking: Repacking, block: MoeBlock, kinds: Kinds) -> None:
        self.repacking, self.block, self.kinds = repacking, block, kinds
        self.cut = {n: held(p) for n, p in block.block.named_parameters()}
        self.before = self.size = 0.0
        self.tensors: dict[str, Tensor] = {}

    def only_cut(self, j: int, given: Tensor, out: Tensor, target: Tensor) -> None:
        """What the layer makes of a batch before any repair.

        Args:
            given, out, target: [B, L, D] into it, out of it, and wanted out of it.
        """
        self.before += self._squares(j, target, out)
        self.size += self._squares(j, target, given)

    def settle(
        self,
        done: LayerRepair,
        changed: Mapping[str, nn.Parameter],
        runs: Iterator[tuple[int, Tensor, Tensor]],
    ) -> LayerRepair:
        """Give the block the values that will be stored, or what it was cut to.

        Args:
            changed: name in the model -> parameter.
            runs: number of a batch, what the layer makes of it, and what is wanted; it is asked for
                once the block has its values.

        Returns:
            what was done after all.
        """
        for name, p in changed.items():
            if name in self.repacking:
                values, stored = self.repacking.pack(name, p)
                p.data.copy_(values)
                self.tensors |= stored
        if not self.tensors:
            return done
        after = sum(self._squares(j, target, out) for j, out, target in runs)
        if after < self.before:
            size = max(self.size, 1e-300)
            return replace(done, tuned_after=after / size) if done.epoch else done
        for n, p in self.block.block.named_parameters():
            p.data.copy_(self.cut[n])
        self.tensors.clear()
        return replace(
            done, repair="none", ridge=0.0, after=done.before, epoch=0,
            tuned_after=done.tuned_before,
        )  # fmt: skip

    def _squares(self, j: int, a: Tensor, b: Tensor) -> float:
        """Σ (a - b)² over a batch's tokens that judge, of [B, L, D]; NaN never passes for small."""
        e = float(self.kinds.squares(j, a, b, bool(self.kinds.judging)))
        return e if e == e else float("inf")
