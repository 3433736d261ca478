"""What llm-compressor writes: compressed-tensors, whose own compressors pack and unpack here.

INT4 and INT8 in 32-bit words (`pack-quantized`, Kimi-K2), FP8 and INT8 (`float-quantized`,
`int-quantized`, `naive-quantized`), NVFP4 and MXFP4. Which weights are packed how is a list of
groups in the config, each with the modules that it is meant for.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from moe_fair.engines.packing.scheme import (
    CODES,
    FLOATS,
    FP8_LARGEST,
    SCALE,
    SHARES,
    ZERO,
    PackedWeight,
    expect,
    gather,
)
from moe_fair.engines.packing.words import unpack_words
from moe_fair.engines.shards import StoredTensor

INSTALL = "pip install 'moe_fair[packed]'"
WORDS, NUMBERS = "pack-quantized", ("float-quantized", "int-quantized", "naive-quantized")
NVFP4, MXFP4 = "nvfp4-pack-quantized", "mxfp4-pack-quantized"
SHAPE, GLOBAL, ORDER = "shape", "global scale", "group index"
ROLES = {
    CODES: ".weight_packed", SCALE: ".weight_scale", ZERO: ".weight_zero_point",
    SHAPE: ".weight_shape", GLOBAL: ".weight_global_scale", ORDER: ".weight_g_idx",
}  # fmt: skip
DTYPES = {WORDS: ("I32",), NVFP4: ("U8",), MXFP4: ("U8",)} | dict.fromkeys(
    NUMBERS, ("F8_E4M3", "I8")
)


class CompressedTensors:
    """See the module.

    Args:
        settings: `quantization_config`.

    Raises:
        ValueError: the package is not installed, or cannot read the settings; or a format of it
            that is not unpacked here.
    """

    name = "compressed-tensors"

    def __init__(self, settings: Mapping[str, Any]) -> None:
        try:
            from compressed_tensors.quantization import QuantizationConfig
        except ImportError as e:
            raise ValueError(
                "the weights are packed by compressed-tensors, which is not installed here: "
                f"{INSTALL}"
            ) from e
        try:
            config = QuantizationConfig.model_validate(dict(settings))
        except ValueError as e:
            why = str(e).splitlines()
            raise ValueError(
                f"quantization_config in config.json cannot be read: {' '.join(why[:3])}"
            ) from e
        sparse = settings.get("sparsity_config") or {}
        if sparse.get("format", "dense") != "dense":
            raise ValueError(f"weights packed as sparse ({sparse['format']}) are not unpacked")
        self.groups: list[Any] = list(config.config_groups.values())
        self.format = str(config.format)
        for group in self.groups:
            if group.weights is None or (how := self._format(group)) not in DTYPES:
                raise ValueError(
                    "weights that compressed-tensors packed as "
                    f"{how if group.weights is not None else 'nothing'} are not unpacked; only "
                    f"{', '.join(DTYPES)}"
                )

    def find(self, tensors: Sequence[StoredTensor]) -> list[PackedWeight]:
        """See `Scheme`."""
        packed = gather(
            [t for t in tensors if t.name.removesuffix(".weight") == t.name],
            ROLES, (SCALE,), ".weight",
        )  # fmt: skip
        by_name = {t.name: t for t in tensors}
        found = []
        for name, parts in packed.items():
            if CODES not in parts and name in by_name:
                parts[CODES] = by_name[name]
            found.append(self._weight(name, parts))
        return found

    def unpack(self, weight: PackedWeight, parts: Mapping[str, Tensor]) -> Tensor:
        """See `Scheme`."""
        from compressed_tensors.compressors import BaseCompressor
        from compressed_tensors.compressors.nvfp4.helpers import unpack_fp4_from_uint8
        from compressed_tensors.quantization.lifecycle.forward import dequantize

        group = self._group(weight.name)
        how = self._format(group)
        if how == NVFP4:  # its compressor rounds to bfloat16
            rows, columns = parts[CODES].shape
            codes = unpack_fp4_from_uint8(parts[CODES], rows, columns * 2, dtype=torch.float32)
            scale = parts[SCALE].float()
            values: Tensor = dequantize(
                codes, scale, None, group.weights, global_scale=parts[GLOBAL].float()
            )
            return values
        if how == WORDS and group.weights.num_bits == 4 and group.weights.symmetric:
            return _words_of_four(parts, weight.shape)
        state = _named(parts, how)
        if how != MXFP4:
            state["weight_scale"] = state["weight_scale"].float()
        compressor = BaseCompressor.get_value_from_registry(how)
        unpacked: Tensor = compressor.decompress(state, group)["weight"]
        return unpacked

    def pack(
        self, weight: PackedWeight, values: Tensor, like: Mapping[str, Tensor]
    ) -> dict[str, Tensor]:
        """See `Scheme`; below 8 bits each group takes the scale that comes nearest."""
        from compressed_tensors.compressors import BaseCompressor
        from compressed_tensors.compressors.mx_utils import decompress_mx_scale

        group = self._group(weight.name)
        how, args = self._format(group), group.weights
        values = values.float()
        scale, zero = _scales(values, group, like)
        state = {"weight": values, "weight_scale": scale}
        if zero is not None:
            state["weight_zero_point"] = zero
        if GLOBAL in like:
            state["weight_global_scale"] = like[GLOBAL].float()
        compressor = BaseCompressor.get_value_from_registry(how)
        new = compressor.compress(state, group)
        codes = new["weight"] if how in NUMBERS else new["weight_packed"]
        found = {CODES: codes.to(like[CODES].dtype)}
        if how == MXFP4:
            assert torch.equal(decompress_mx_scale(new["weight_scale"]), scale)
        found[SCALE] = new["weight_scale"].to(like[SCALE].dtype).view(like[SCALE].shape)
        if ZERO in like and not args.symmetric:
            found[ZERO] = new["weight_zero_point"].to(like[ZERO].dtype).view(like[ZERO].shape)
        return found

    def _format(self, group: Any) -> str:
        return str(getattr(group.format, "value", group.format) or self.format)

    def _group(self, name: str) -> Any:
        """The group of a weight: one that names its module, else one that names all of its kind."""
        module = name.removesuffix(".weight")
        for group in self.groups:
            if any(_matches(module, target) for target in group.targets):
                return group
        for group in self.groups:
            if any(target in ("Linear", "Embedding") for target in group.targets):
                return group
        raise ValueError(
            f"{name} is packed, and no group of config.json's quantization_config is meant for it"
        )

    def _weight(self, name: str, parts: dict[str, StoredTensor]) -> PackedWeight:
        group = self._group(name)
        how, args = self._format(group), group.weights
        if CODES not in parts:
            raise ValueError(
                f"{parts[SCALE].name} is of a packed weight, and its codes are missing; download "
                "or copy the checkpoint again"
            )
        codes = parts[CODES]
        own = codes.name.endswith("_packed")
        if own != (how not in NUMBERS) or codes.dtype not in DTYPES[how] or len(codes.shape) != 2:
            raise ValueError(
                f"{codes.name} is {codes.dtype} {list(codes.shape)}, and config.json says {how}: "
                "the config and the tensors contradict each other"
            )
        if ORDER in parts:
            raise ValueError(
                f"{parts[ORDER].name}: groups in their own order (actorder: group), which "
                "compressed-tensors itself no longer reads, are not unpacked; prune the original "
                "model and quantise the result, as with actorder: static"
            )
        for role, wanted in ((ZERO, not args.symmetric), (GLOBAL, how == NVFP4)):
            if wanted and role not in parts:
                raise ValueError(
                    f"{codes.name} is of a packed weight, and {name.removesuffix('.weight')}"
                    f"{ROLES[role]} ({role}) is missing; download or copy the checkpoint again"
                )
        rows, columns = codes.shape
        shape = (rows, columns * _per_element(how, args.num_bits))
        if args.group_size and args.group_size > 0:
            columns = parts[SCALE].shape[-1] * args.group_size
            if how != WORDS and columns != shape[1]:
                columns = shape[1] // args.group_size * args.group_size
            shape = (rows, columns)
            if math.ceil(columns * args.num_bits / 32) != codes.shape[1] and how == WORDS:
                raise ValueError(
                    f"{parts[SCALE].name} {list(parts[SCALE].shape)} has no scale for every group "
                    f"of {args.group_size} of {codes.name} {list(codes.shape)}"
                )
        dtypes = ["F8_E4M3"] if how == NVFP4 else ["U8"] if how == MXFP4 else list(FLOATS)
        expect(
            parts[SCALE],
            dtypes,
            _scale_shape(args, shape, parts[SCALE]),
            f"{how} ({args.strategy})",
        )
        return PackedWeight(name, shape, parts)


def _words_of_four(parts: Mapping[str, Tensor], shape: Sequence[int]) -> Tensor:
    """What the library's compressor gives, in a tenth of its time: a streamed expert of Kimi-K2 is
    unpacked again for every batch."""
    rows, columns = shape
    scale = parts[SCALE].float().view(rows, -1)
    codes = unpack_words(parts[CODES], 4)[:, :columns]
    values = codes.float().view(rows, scale.shape[1], -1)
    return values.sub_(8).mul_(scale.unsqueeze(-1)).view(rows, columns)


def _matches(module: str, target: str) -> bool:
    """As compressed-tensors reads a target: a name, or a pattern after `re:`."""
    if target.startswith("re:"):
        return re.match(target.removeprefix("re:"), module) is not None
    return module == target


def _per_element(how: str, bits: int) -> int:
    if how in NUMBERS:
        return 1
    return 2 if how in (NVFP4, MXFP4) else 32 // bits


def _scale_shape(args: Any, shape: tuple[int, int], scale: StoredTensor) -> tuple[int, ...]:
    """What a strategy wants; the shape that it has where several are allowed."""
    rows, columns = shape
    strategy = args.strategy
    if strategy == "channel":
        return scale.shape if scale.shape == (rows,) else (rows, 1)
    if strategy in ("group", "tensor_group"):
        return (rows, -(-columns // args.group_size))
    if strategy == "block":
        high, wide = args.block_structure
        return (-(-rows // high), -(-columns // wide))
    return scale.shape if scale.numel == 1 else (1,)


def _named(parts: Mapping[str, Tensor], how: str) -> dict[str, Tensor]:
    """As the compressors name them."""
    names = {role: end.removeprefix(".") for role, end in ROLES.items()}
    if how in NUMBERS:
        names[CODES] = "weight"
    return {names[role]: t for role, t in parts.items()}


def _scales(values: Tensor, group: Any, like: Mapping[str, Tensor]) -> tuple[Tensor, Tensor | None]:
    """Scales and zero points of new values; each group's that comes nearest to them."""
    from compressed_tensors.quantization.lifecycle.forward import fake_quantize
    from compressed_tensors.quantization.utils import calculate_qparams

    args = group.weights
    shared = like[GLOBAL].float() if GLOBAL in like else None
    low, high = _extremes(values, args)
    dtype = torch.float32 if like[SCALE].dtype == torch.uint8 else like[SCALE].dtype
    best: Tensor | None = None
    shares: list[float | None] = [*(SHARES if args.num_bits < 8 else SHARES[:1])]
    if args.symmetric and args.num_bits < 8 and like[SCALE].dtype != torch.uint8:
        shares.append(None)  # the old scale: where weights hardly moved, most codes stay
    for share in shares:
        if share is None:
            scale = like[SCALE].float()
        else:
            scale, zero = calculate_qparams(low * share, high * share, args, global_scale=shared)
            if dtype == torch.float8_e4m3fn:
                scale = scale.clamp_max(FP8_LARGEST)
            scale = scale.to(dtype).float()
        near = fake_quantize(
            values, scale, None if args.symmetric else zero, args, global_scale=shared
        )
        error = _sums((near.float() - values).square(), args)
        if best is None:
            best, chosen, zeros = error, scale, zero
            continue
        nearer = (error < best).view(scale.shape)
        chosen = torch.where(nearer, scale, chosen)
        zeros = torch.where(nearer.view(zero.shape), zero, zeros)
        best = torch.minimum(best, error)
    return chosen, None if args.symmetric else zeros


def _groups(values: Tensor, args: Any) -> Tensor:
    """[scales..., weights of each] as a strategy divides a matrix."""
    strategy = args.strategy
    rows, columns = values.shape
    if strategy in ("group", "tensor_group"):
        return values.unflatten(-1, (-1, args.group_size))
    if strategy == "channel":
        return values.unsqueeze(1)
    if strategy == "block":
        high, wide = args.block_structure
        up, across = -(-rows // high), -(-columns // wide)
        padded = values.new_zeros(up * high, across * wide)
        padded[:rows, :columns] = values
        return padded.view(up, high, across, wide).transpose(1, 2).flatten(2)
    return values.reshape(1, -1)


def _extremes(values: Tensor, args: Any) -> tuple[Tensor, Tensor]:
    groups = _groups(values, args)
    return groups.amin(-1), groups.amax(-1)


def _sums(values: Tensor, args: Any) -> Tensor:
    return _groups(values, args).sum(-1)
