"""Tiny checkpoints packed by the schemes' own libraries, and what their bytes stand for."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny import tiny_model
from torch import Tensor

GROUP = 16  # of the tiny models' widths
IGNORED = ["lm_head", "re:.*self_attn.*", "re:.*mlp.gate$"]
# what llm-compressor calls it -> changes of its weights' settings
COMPRESSED: dict[str, dict[str, Any]] = {
    "W4A16": {"group_size": GROUP}, "W4A16_ASYM": {"group_size": GROUP},
    "W8A16": {"group_size": GROUP}, "W8A8": {}, "FP8": {}, "FP8_DYNAMIC": {},
    "FP8_BLOCK": {"block_structure": [16, 16]}, "NVFP4A16": {}, "MXFP4A16": {},
}  # fmt: skip
Stored = dict[str, Tensor]
# e2m1: sign, two bits of exponent, one of mantissa
FP4 = torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4, 6, -0.0, -0.5, -1, -1.5, -2, -3, -4, -6])


def nvfp4(codes: Tensor, scale: Tensor) -> Tensor:
    """NVFP4 as NVIDIA describes it: FP4 × a scale of 16, which is FP8 × one of the matrix."""
    values = torch.stack([FP4[(codes & 15).long()], FP4[(codes >> 4).long()]], -1).flatten(-2)
    return values * scale.repeat_interleave(16, -1)


def mxfp4(folder: Path) -> Stored:
    """gpt-oss as OpenAI ships it: random nibbles and powers of two.

    Returns:
        the checkpoint's tensors unpacked.
    """
    tiny_model("gpt_oss").save_pretrained(folder)
    generator = torch.Generator().manual_seed(0)
    packed: Stored = {}
    plain: Stored = {}
    for name, t in tensors_of(folder).items():
        if not name.endswith(("gate_up_proj", "down_proj")) or "experts" not in name:
            packed[name] = plain[name] = t.to(torch.bfloat16)
            continue
        e, width, rows = t.shape  # the model holds them transposed
        blocks = torch.randint(256, (e, rows, width // 32, 16), generator=generator).byte()
        scales = torch.randint(120, 124, (e, rows, width // 32), generator=generator).byte()
        values = torch.stack([FP4[(blocks & 15).long()], FP4[(blocks >> 4).long()]], -1)
        values = values.flatten(-2) * 2.0 ** (scales.float() - 127).unsqueeze(-1)
        plain[name] = values.flatten(-2).transpose(1, 2).to(torch.bfloat16)  # holds them all
        packed |= {f"{name}_blocks": blocks, f"{name}_scales": scales}
    skip = [
        "model.layers.*.self_attn",
        "model.layers.*.mlp.router",
        "model.embed_tokens",
        "lm_head",
    ]
    rewrite(folder, packed, {"quant_method": "mxfp4", "modules_to_not_convert": skip})
    return plain


def fp8(folder: Path, square: int = 16) -> Stored:
    """As DeepSeek publishes: a scale for every square, the last of which may be cut off.

    Returns:
        the checkpoint's tensors unpacked.
    """

    def pack(name: str, t: Tensor) -> tuple[Stored, Tensor]:
        rows, columns = t.shape
        codes = torch.empty_like(t, dtype=torch.float8_e4m3fn)
        scale = torch.empty(-(-rows // square), -(-columns // square))
        plain = torch.empty_like(t)
        for i in range(scale.shape[0]):
            for j in range(scale.shape[1]):
                at = slice(i * square, (i + 1) * square), slice(j * square, (j + 1) * square)
                scale[i, j] = t[at].abs().max() / 448
                codes[at] = (t[at] / scale[i, j]).to(codes.dtype)
                plain[at] = codes[at].float() * scale[i, j]
        return {f"{name}.weight": codes, f"{name}.weight_scale_inv": scale}, plain

    packed, plain = pack_experts(folder, pack)
    settings = {
        "quant_method": "fp8", "weight_block_size": [square, square],
        "activation_scheme": "dynamic",
        "modules_to_not_convert": ["lm_head", "embed_tokens", "self_attn", "gate"],
    }  # fmt: skip
    rewrite(folder, packed, settings)
    return plain


def tensors_of(folder: Path) -> Stored:
    """All tensors of a checkpoint."""
    return {n: t for f in sorted(folder.glob("*.safetensors")) for n, t in load_file(f).items()}


def rewrite(folder: Path, stored: Stored, settings: dict[str, Any] | None) -> None:
    """Put tensors into a checkpoint of one file, and into its config how they are packed."""
    for f in folder.glob("*.safetensors*"):
        f.unlink()
    stored = {n: t.contiguous() for n, t in stored.items()}
    save_file(stored, folder / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((folder / "config.json").read_text())
    config.pop("quantization_config", None)
    if settings is not None:
        config["quantization_config"] = settings
    (folder / "config.json").write_text(json.dumps(config))


def plain_copy(folder: Path, to: Path, stored: Stored) -> Path:
    """The checkpoint with these weights, which are not packed."""
    shutil.copytree(folder, to)
    (to / "hf_quant_config.json").unlink(missing_ok=True)
    rewrite(to, stored, None)
    return to


def pack_experts(
    folder: Path, pack: Callable[[str, Tensor], tuple[Stored, Tensor]], kind: str = "qwen3_moe"
) -> tuple[Stored, Stored]:
    """Write a tiny model; pack every expert's matrix.

    Args:
        pack: name without `.weight`, [rows, columns] -> stored tensors, and what they stand for.

    Returns:
        packed tensors, and the same unpacked in float32.
    """
    tiny_model(kind).save_pretrained(folder)
    packed: Stored = {}
    plain: Stored = {}
    for name, t in tensors_of(folder).items():
        if ".experts." not in name or not name.endswith(".weight"):
            packed[name] = plain[name] = t
            continue
        new, plain[name] = pack(name.removesuffix(".weight"), t)
        packed |= new
    return packed, plain


def modelopt_fp8(folder: Path, rows: bool = False) -> Stored:
    """As NVIDIA publishes it: a scale of a matrix, or of each row; one of activations beside it."""

    def pack(name: str, t: Tensor) -> tuple[Stored, Tensor]:
        scale = (t.abs().amax(1) if rows else t.abs().max()) / 448
        wide = scale.unsqueeze(1) if rows else scale
        codes = (t / wide).to(torch.float8_e4m3fn)
        stored = {f"{name}.weight": codes, f"{name}.weight_scale": scale}
        return {**stored, f"{name}.input_scale": torch.ones(())}, codes.float() * wide

    packed, plain = pack_experts(folder, pack)
    algorithm = "FP8_PER_CHANNEL_PER_TOKEN" if rows else "FP8"
    settings = {"quant_method": "modelopt", "quant_algo": algorithm, "ignore": ["lm_head"]}
    rewrite(folder, packed, settings)
    return plain


def modelopt_nvfp4(folder: Path) -> Stored:
    """As NVIDIA publishes it: random nibbles and scales, told by the file beside the config."""
    generator = torch.Generator().manual_seed(0)

    def pack(name: str, t: Tensor) -> tuple[Stored, Tensor]:
        rows, columns = t.shape
        codes = torch.randint(256, (rows, columns // 2), generator=generator).byte()
        scale = (torch.rand(rows, columns // 16, generator=generator) * 300 + 50).to(
            torch.float8_e4m3fn
        )
        shared = torch.rand((), generator=generator) * 2e-4
        stored = {
            f"{name}.weight": codes, f"{name}.weight_scale": scale,
            f"{name}.weight_scale_2": shared, f"{name}.input_scale": torch.ones(()),
        }  # fmt: skip
        return stored, nvfp4(codes, scale.float() * shared)

    packed, plain = pack_experts(folder, pack)
    rewrite(folder, packed, None)
    said = {"quant_algo": "NVFP4", "group_size": 16, "exclude_modules": ["lm_head"]}
    about = {"producer": {"name": "modelopt"}, "quantization": said}
    (folder / "hf_quant_config.json").write_text(json.dumps(about))
    return plain


def _bits(words: np.ndarray, place: np.ndarray, bits: int) -> np.ndarray:
    return (words.astype(np.int64) >> (place * bits)) & (2**bits - 1)


def gptq(folder: Path, bits: int = 4, ordered: bool = False, v2: bool = False) -> Stored:
    """As AutoGPTQ packs: `w |= code << bits * j` down the inputs, zero points less one across.

    Args:
        ordered: with inputs in an order of their own (`desc_act`).
        v2: zero points as they are.
    """
    generator = torch.Generator().manual_seed(0)
    each, lowest = 32 // bits, -(2**31)

    def words(*shape: int) -> Tensor:
        return torch.randint(lowest, 2**31 - 1, shape, generator=generator).int()

    def pack(name: str, t: Tensor) -> tuple[Stored, Tensor]:
        outputs, inputs = t.shape
        groups = inputs // GROUP
        group = torch.arange(inputs) // GROUP
        if ordered:
            group = group[torch.randperm(inputs, generator=generator)]
        codes, zeros = words(inputs // each, outputs), words(groups, outputs // each)
        scales = (torch.rand(groups, outputs, generator=generator) * 0.02 / 2 ** (bits - 4)).half()
        plain = torch.empty(outputs, inputs)
        c, z, s = codes.numpy(), zeros.numpy(), scales.float().numpy()
        o = np.arange(outputs)
        for i in range(inputs):
            g = int(group[i])
            zero = _bits(z[g, o // each], o % each, bits)
            zero = zero if v2 else (zero + 1) % 2**bits
            code = _bits(c[i // each], np.array(i % each), bits)
            plain[:, i] = torch.from_numpy((code - zero).astype(np.float32) * s[g])
        stored = {"qweight": codes, "qzeros": zeros, "scales": scales, "g_idx": group.int()}
        return {f"{name}.{k}": v for k, v in stored.items()}, plain

    packed, plain = pack_experts(folder, pack)
    settings = {
        "quant_method": "gptq", "bits": bits, "group_size": GROUP, "desc_act": ordered,
        "sym": False, "checkpoint_format": "gptq_v2" if v2 else "gptq",
    }  # fmt: skip
    rewrite(folder, packed, settings)
    return plain


def awq(folder: Path) -> Stored:
    """As AutoAWQ's GEMM packs: `order_map = [0, 2, 4, 6, 1, 3, 5, 7]` across the outputs."""
    generator = torch.Generator().manual_seed(0)
    order = [0, 2, 4, 6, 1, 3, 5, 7]

    def pack(name: str, t: Tensor) -> tuple[Stored, Tensor]:
        outputs, inputs = t.shape
        groups = inputs // GROUP
        numbers = torch.randint(16, (inputs, outputs), generator=generator)
        zeros = torch.randint(16, (groups, outputs), generator=generator)
        scales = (torch.rand(groups, outputs, generator=generator) * 0.02).half()

        def words(numbers: Tensor) -> Tensor:
            found = torch.zeros(len(numbers), outputs // 8, dtype=torch.int64)
            for column in range(outputs // 8):
                for i in range(8):
                    found[:, column] |= numbers[:, column * 8 + order[i]] << (i * 4)
            return torch.from_numpy(found.numpy().astype(np.uint32).view(np.int32))

        stored = {"qweight": words(numbers), "qzeros": words(zeros), "scales": scales}
        wide = (t.repeat_interleave(GROUP, 0) for t in (zeros, scales.float()))
        zero, scale = wide
        plain = ((numbers - zero) * scale).T.contiguous()
        return {f"{name}.{k}": v for k, v in stored.items()}, plain

    packed, plain = pack_experts(folder, pack)
    settings = {
        "quant_method": "awq", "bits": 4, "group_size": GROUP, "zero_point": True,
        "version": "gemm", "modules_to_not_convert": None,
    }  # fmt: skip
    rewrite(folder, packed, settings)
    return plain


def compressed(folder: Path, preset: str) -> Stored:
    """As llm-compressor writes it, by compressed-tensors' own compressors.

    Returns:
        the checkpoint's tensors as that library decompresses them, from its numbers in float32.
    """
    pytest.importorskip("compressed_tensors", reason="an optional extra: moe_fair[packed]")
    from compressed_tensors.compressors import BaseCompressor
    from compressed_tensors.compressors.format import infer_module_format
    from compressed_tensors.quantization import QuantizationConfig
    from compressed_tensors.quantization.quant_scheme import preset_name_to_scheme
    from compressed_tensors.quantization.utils import calculate_qparams, generate_gparam

    scheme = preset_name_to_scheme(preset, ["Linear"])
    for key, value in COMPRESSED[preset].items():
        setattr(scheme.weights, key, value)
    scheme.format = infer_module_format(torch.nn.Linear, scheme)
    compressor = BaseCompressor.get_value_from_registry(scheme.format.value)

    def pack(name: str, w: Tensor) -> tuple[Stored, Tensor]:
        args = scheme.weights
        shared = None
        if args.strategy == "tensor_group":
            shared = generate_gparam(w.min().view(1), w.max().view(1))
        groups = {
            "group": lambda: w.unflatten(-1, (-1, args.group_size)),
            "tensor_group": lambda: w.unflatten(-1, (-1, args.group_size)),
            "channel": lambda: w.unsqueeze(1), "tensor": lambda: w.view(1, -1),
            "block": lambda: w.view(
                len(w) // 16, 16, w.shape[1] // 16, 16
            ).transpose(1, 2).flatten(2),
        }[str(args.strategy)]()  # fmt: skip
        low, high = groups.amin(-1), groups.amax(-1)
        scale, zero = calculate_qparams(low, high, args, global_scale=shared)
        if args.num_bits > 4 or args.type == "int":
            scale = scale.to(torch.bfloat16)
        state = {"weight": w, "weight_scale": scale, "weight_zero_point": zero}
        if shared is not None:
            state["weight_global_scale"] = shared
        new = compressor.compress(state, scheme)
        again = dict(new)
        if again["weight_scale"].dtype == torch.bfloat16:
            again["weight_scale"] = again["weight_scale"].float()
        plain = compressor.decompress(again, scheme)["weight"].float()
        if shared is not None:  # rounded to bfloat16 by the library: multiplied out here
            rough, plain = plain, nvfp4(new["weight_packed"], new["weight_scale"].float() / shared)
            assert torch.allclose(rough, plain, rtol=2**-6, atol=0)
        return {f"{name}.{k}": v for k, v in new.items()}, plain

    packed, plain = pack_experts(folder, pack)
    config = QuantizationConfig(
        config_groups={"group_0": scheme}, format=scheme.format.value, ignore=IGNORED,
        quantization_status="compressed",
    )  # fmt: skip
    rewrite(folder, packed, json.loads(config.model_dump_json(exclude_none=True)))
    return plain


SCHEMES: dict[str, Callable[[Path], Stored]] = {
    "mxfp4": mxfp4, "fp8": fp8, "fp8, squares cut off": partial(fp8, square=24),
    "ModelOpt FP8": modelopt_fp8, "ModelOpt FP8 of rows": partial(modelopt_fp8, rows=True),
    "ModelOpt NVFP4": modelopt_nvfp4, "GPTQ": gptq, "AWQ": awq,
    "GPTQ, ordered": partial(gptq, ordered=True, v2=True), "GPTQ, 8 bits": partial(gptq, bits=8),
    "GPTQ, 2 bits": partial(gptq, bits=2),
    **{name: partial(compressed, preset=name) for name in COMPRESSED},
}  # fmt: skip
