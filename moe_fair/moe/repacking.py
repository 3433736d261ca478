"""New values of packed weights: packed as the checkpoint packs them, and judged as they then are.

A repair or a merge changes tensors of the model. Where the checkpoint keeps such a tensor packed,
each of its matrices is packed again by its own scheme; a matrix that did not change keeps its
bytes. Packing rounds, to four bits in the worst case, so a repaired layer is judged once more as it
will be stored: one that is no better than the layer only cut is left as it was cut.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from moe_fair.engines.names import Destination
from moe_fair.engines.packing import PackedWeight
from moe_fair.engines.packing.scheme import CODES
from moe_fair.engines.shards import StoredTensor
from moe_fair.engines.stored_values import read_tensor
from moe_fair.moe.blocks import MoeBlock
from moe_fair.moe.checkpoint_source import Checkpoint
from moe_fair.moe.layer_examples import Kinds
from moe_fair.moe.layer_repair import LayerRepair
from moe_fair.moe.tensor_slicing import cut_tensors

PACKED = "packed: "  # name, in a repair's file, of a tensor as the result will store it


@dataclass(frozen=True)
class _Matrix:
    """A packed weight within a tensor of the model.

    Attributes:
        parts: role -> stored tensor, as it is after the cut.
        place: number of the expert that it is of, after the cut; None where it is the whole tensor.
    """

    weight: PackedWeight
    where: Destination
    parts: Mapping[str, StoredTensor]
    place: int | None

    def of(self, tensor: Tensor) -> Tensor:
        """What of the tensor of the model it is."""
        if self.place is None:
            return tensor
        return tensor[self.place].chunk(self.where.parts)[self.where.part or 0]


class Repacking:
    """The packed weights of a checkpoint after a cut, by the tensors of the model that they make.

    Args:
        source: a checkpoint with packed weights.
        kept: block name -> ids that stay.
    """

    def __init__(self, source: Checkpoint, kept: Mapping[str, Sequence[int]]) -> None:
        assert source.packing is not None
        self.packing = source.packing
        self._matrices: dict[str, list[_Matrix]] = {}
        for weight in self.packing.weights.values():
            where = source.find(weight.name)
            parts = {
                role: cut
                for role, t in weight.parts.items()
                for cut in cut_tensors([t], source.parts, kept)
            }
            if not parts:  # its expert left
                continue
            own = source.parts.get(weight.parts[CODES].name)
            place = None
            if own is not None and own.expert is not None:
                ids = kept.get(own.block)
                place = own.expert if ids is None else list(ids).index(own.expert)
            matrix = _Matrix(weight, where, parts, place)
            self._matrices.setdefault(where.name, []).append(matrix)

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
            like = {role: read_tensor(t) for role, t in m.parts.items()}
            new = self.packing.pack(m.weight, m.of(near), like)
            m.of(near).copy_(self.packing.scheme.unpack(m.weight, new))
            stored |= {m.parts[role].name: t.contiguous() for role, t in new.items()}
        return near.to(values.device), stored

    def is_of(self, name: str, original: Tensor) -> bool:
        """The first matrices of a tensor are, unpacked, what the model had.

        Args:
            original: of the first expert that stays, where they are experts'.
        """
        for m in self._matrices[name]:
            if m.place in (None, 0):
                like = {role: read_tensor(t) for role, t in m.parts.items()}
                found = self.packing.scheme.unpack(m.weight, like).to(original.dtype)
                wanted = m.of(original)
                if not torch.equal(found[: len(wanted)].reshape(-1), wanted.reshape(-1)):
                    return False
        return True


class StoredLayer:
    """One layer's repair, judged as it will be stored.

    Args:
        kinds: which tokens judge; where none does, those that teach have to.
    """

    def __init__(self, repacking: Repacking, block: MoeBlock, kinds: Kinds) -> None:
        self.repacking, self.block, self.kinds = repacking, block, kinds
        self.cut = {n: p.detach().cpu().clone() for n, p in block.block.named_parameters()}
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
