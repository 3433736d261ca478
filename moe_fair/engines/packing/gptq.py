"""GPTQ and AWQ: whole numbers of a few bits in 32-bit words, transposed, with groups' zero points.

    w[o, i] = scales[g, o] · (code[i, o] - zero[g, o])       g: the group of input i

GPTQ packs codes along the inputs, names each input's group (`g_idx`), and stores a zero point less
one, unless its `checkpoint_format` is `gptq_v2`. AWQ (`gemm`) packs along the outputs in an order
of its own. Zero points of both lie along the outputs.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from moe_fair.engines.packing.scheme import (
    CODES,
    FLOATS,
    SCALE,
    SHARES,
    ZERO,
    PackedWeight,
    expect,
    gather,
)
from moe_fair.engines.packing.words import pack_words, unpack_words
from moe_fair.engines.shards import StoredTensor

ORDER = "group index"
ROLES = {CODES: ".qweight", ZERO: ".qzeros", SCALE: ".scales", ORDER: ".g_idx"}
BITS = (2, 4, 8)
AWQ_ORDER = (0, 4, 1, 5, 2, 6, 3, 7)  # place in the word of each number in turn


class GPTQ:
    """See the module.

    Args:
        settings: `quantization_config`.

    Raises:
        ValueError: another number of bits, or another format.
    """

    name = "gptq"
    needed: tuple[str, ...] = (CODES, ZERO, SCALE, ORDER)
    kinds: tuple[str, ...] = ("gptq", "gptq_v2")

    def __init__(self, settings: Mapping[str, Any]) -> None:
        self.bits = int(settings.get("bits") or settings.get("w_bit") or 4)
        self.size = int(settings.get("group_size") or settings.get("q_group_size") or 128)
        self.symmetric = bool(settings.get("sym", False))
        kind = str(settings.get("checkpoint_format") or settings.get("version") or self.kinds[0])
        if self.bits not in BITS or kind.lower() not in self.kinds:
            raise ValueError(
                f"{self.name} weights of {self.bits} bits in the format {kind} are not unpacked; "
                f"only of {' or '.join(map(str, BITS))} in {' or '.join(self.kinds)}"
            )
        self.less = 1 if kind == "gptq" else 0  # a zero point is stored so much smaller

    def find(self, tensors: Sequence[StoredTensor]) -> list[PackedWeight]:
        """See `Scheme`."""
        each = 32 // self.bits
        found = []
        for name, parts in gather(tensors, ROLES, self.needed, ".weight").items():
            codes = parts[CODES]
            if codes.dtype != "I32" or len(codes.shape) != 2:
                raise ValueError(f"{codes.name} is {codes.dtype} {list(codes.shape)}, no words")
            inputs, outputs = self._wide(codes.shape)
            size = inputs if self.size < 0 else self.size
            groups = -(-inputs // size)
            why = f"{self.name} of {self.bits} bits in groups of {size}"
            expect(parts[SCALE], FLOATS, (groups, outputs), why)
            expect(parts[ZERO], ["I32"], (groups, outputs // each), why)
            if ORDER in parts:
                expect(parts[ORDER], ["I32", "I64"], (inputs,), why)
            found.append(PackedWeight(name, (outputs, inputs), parts))
        return found

    def unpack(self, weight: PackedWeight, parts: Mapping[str, Tensor]) -> Tensor:
        """See `Scheme`."""
        scale, zero = parts[SCALE].float(), self._zeros(parts[ZERO])
        group = self._group(weight, parts)
        codes = self._codes(parts[CODES]).float()
        return ((codes - zero[group]) * scale[group]).T.contiguous()

    def pack(
        self, weight: PackedWeight, values: Tensor, like: Mapping[str, Tensor]
    ) -> dict[str, Tensor]:
        """See `Scheme`; each group takes the scale that comes nearest, zero points as they can."""
        group = self._group(weight, like)
        w = values.float().T  # [inputs, outputs]
        old = like[SCALE]
        low, high = (
            torch.zeros(old.shape, device=w.device).scatter_reduce(
                0, group.unsqueeze(1).expand_as(w), w, how
            )
            for how in ("amin", "amax")
        )
        most = 2**self.bits - 1
        middle = self._zeros(like[ZERO])
        best = torch.full_like(low, torch.inf)
        for share in SHARES if self.bits < 8 else SHARES[:1]:
            if self.symmetric:
                zero = middle
                scale = torch.maximum(-low / zero, high / (most - zero).clamp_min(1)) * share
            else:
                scale = (high - low) * share / most
            scale = scale.clamp_min(1e-8 if old.dtype != torch.float16 else 6e-8)
            scale = scale.to(old.dtype).float()
            if not self.symmetric:
                zero = (-low * share / scale).round().clamp(self.less, most)
            codes = (w / scale[group] + zero[group]).round().clamp(0, most)
            error = ((codes - zero[group]) * scale[group] - w).square()
            error = torch.zeros_like(low).index_add(0, group, error)
            nearer = error < best
            if not torch.isfinite(best).any():
                scales, zeros = scale, zero
            scales = torch.where(nearer, scale, scales)
            zeros = torch.where(nearer, zero, zeros)
            best = torch.minimum(best, error)
        codes = (w / scales[group] + zeros[group]).round().clamp(0, most)
        return {
            CODES: self._words(codes.to(torch.uint8)),
            SCALE: scales.to(old.dtype),
            ZERO: self._zero_words((zeros - self.less).to(torch.uint8)),
        }

    def _group(self, weight: PackedWeight, parts: Mapping[str, Tensor]) -> Tensor:
        """[inputs] the group of each."""
        groups = len(parts[SCALE])
        if ORDER not in parts:
            inputs = weight.shape[1]
            return torch.arange(inputs, device=parts[SCALE].device) // (
                inputs if self.size < 0 else self.size
            )
        group = parts[ORDER].long()
        if int(group.min()) < 0 or int(group.max()) >= groups:
            raise ValueError(
                f"{weight.parts[ORDER].name} names groups that {weight.parts[SCALE].name} does not "
                "have; download or copy the checkpoint again"
            )
        return group

    def _wide(self, shape: Sequence[int]) -> tuple[int, int]:
        """Inputs and outputs, of codes of this shape."""
        return shape[0] * (32 // self.bits), shape[1]

    def _codes(self, words: Tensor) -> Tensor:
        """[inputs, outputs]."""
        return unpack_words(words.T.contiguous(), self.bits).T

    def _words(self, codes: Tensor) -> Tensor:
        return pack_words(codes.T.contiguous(), self.bits).T.contiguous()

    def _zeros(self, words: Tensor) -> Tensor:
        """[groups, outputs]; what is one less than nothing is the largest number."""
        stored = unpack_words(words, self.bits).int() + self.less
        return (stored & (2**self.bits - 1) if self.less else stored).float()

    def _zero_words(self, zeros: Tensor) -> Tensor:
        return pack_words(zeros, self.bits)


class AWQ(GPTQ):
    """See the module."""

    name = "awq"
    needed = (CODES, ZERO, SCALE)
    kinds = ("gemm",)

    def __init__(self, settings: Mapping[str, Any]) -> None:
        super().__init__(settings)
        if self.bits != 4:
            raise ValueError(f"awq weights of {self.bits} bits are not unpacked; only of 4")
        self.symmetric = not settings.get("zero_point", True)

    def _wide(self, shape: Sequence[int]) -> tuple[int, int]:
        return shape[0], shape[1] * 8

    def _codes(self, words: Tensor) -> Tensor:
        return unpack_words(words, 4, AWQ_ORDER)

    def _words(self, codes: Tensor) -> Tensor:
        return pack_words(codes, 4, AWQ_ORDER)

    def _zeros(self, words: Tensor) -> Tensor:
        return unpack_words(words, 4, AWQ_ORDER).float()

    def _zero_words(self, zeros: Tensor) -> Tensor:
        return pack_words(zeros, 4, AWQ_ORDER)
