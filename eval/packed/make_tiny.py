"""A tiny checkpoint packed by llm-compressor or AutoRound, and the same unpacked by them.

    python eval/packed/make_tiny.py MODEL SCHEME OUT [GROUP]

Run in an environment of llm-compressor (0.14) and auto-round (0.15), where moe_fair is not
installed; MODEL is a tiny checkpoint that transformers wrote. SCHEME is one of llm-compressor's
(FP8_BLOCK, FP8_DYNAMIC, W4A16, W4A16_ASYM, W8A16, NVFP4A16), or `gptq` or `awq`, which AutoRound
writes. GROUP is the size of groups and squares, 16 by default. AutoRound's own layer does not read
a GPTQ zero point of 0, which is stored as -1, as 0.
Writes OUT/packed, and OUT/plain: every packed weight as that library unpacks it, in float32.
"""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

GROUP = int(sys.argv[4]) if len(sys.argv) > 4 else 16  # tiny widths have few of 128
IGNORED = ["lm_head", "re:.*self_attn.*", "re:.*gate$", "re:.*router$"]


def by_llm_compressor(model: str, scheme: str, out: Path) -> None:
    """Quantise without data and save."""
    from compressed_tensors.quantization.quant_scheme import preset_name_to_scheme
    from llmcompressor import oneshot
    from llmcompressor.modeling.moe.linearize import linearize_moe
    from llmcompressor.modifiers.quantization import QuantizationModifier

    found = AutoModelForCausalLM.from_pretrained(model, dtype=torch.bfloat16)
    linearize_moe(found)
    group = preset_name_to_scheme(scheme, ["Linear"])
    if group.weights.strategy == "group":
        group.weights.group_size = GROUP
    if group.weights.strategy == "block":
        group.weights.block_structure = [GROUP, GROUP]
    recipe = QuantizationModifier(config_groups={"group_0": group}, ignore=IGNORED)
    oneshot(model=found, recipe=recipe)
    found.save_pretrained(out, save_compressed=True)


def decompressed(folder: Path) -> dict[str, torch.Tensor]:
    """Every tensor of a compressed-tensors checkpoint, by the library's own compressors."""
    from compressed_tensors.compressors import BaseCompressor
    from compressed_tensors.quantization import QuantizationConfig

    config = json.loads((folder / "config.json").read_text())["quantization_config"]
    settings = QuantizationConfig.model_validate(config)
    [group] = settings.config_groups.values()
    compressor = BaseCompressor.get_value_from_registry(group.format or settings.format)
    stored = tensors(folder)
    found: dict[str, torch.Tensor] = {}
    for module in sorted({n.rpartition(".")[0] for n in stored}):
        own = {n.rpartition(".")[2]: t for n, t in stored.items() if n.rpartition(".")[0] == module}
        if "weight_scale" in own:
            if own["weight_scale"].dtype == torch.bfloat16:
                own["weight_scale"] = own["weight_scale"].float()
            own = {"weight": compressor.decompress(own, group)["weight"]}
        found |= {f"{module}.{n}": t.float() for n, t in own.items()}
    return found


def by_auto_round(model: str, scheme: str, out: Path) -> None:
    """Round to the nearest and save in the format of AutoGPTQ or AutoAWQ."""
    from auto_round import AutoRound
    from transformers import AutoTokenizer

    settings = {"bits": 4, "group_size": GROUP, "sym": False, "iters": 0}
    found = AutoModelForCausalLM.from_pretrained(model, dtype=torch.bfloat16)
    tokenizer = AutoTokenizer.from_pretrained(model)
    rounding = AutoRound(found, tokenizer, disable_opt_rtn=True, **settings)
    rounding.quantize_and_save(str(out), format=f"auto_{scheme}")


def unrounded(folder: Path) -> dict[str, torch.Tensor]:
    """Every tensor of a GPTQ or AWQ checkpoint: AutoRound's own layer run on an identity matrix,
    or compressed-tensors' reading of AutoAWQ's format."""
    from auto_round_extension.torch.qlinear_torch_zp import QuantLinear
    from compressed_tensors.entrypoints.convert.converters.autoawq import AutoAWQConverter

    settings = json.loads((folder / "config.json").read_text())["quantization_config"]
    stored = tensors(folder)
    found: dict[str, torch.Tensor] = {}
    for module in sorted({n.rpartition(".")[0] for n in stored}):
        own = {n.rpartition(".")[2]: t for n, t in stored.items() if n.rpartition(".")[0] == module}
        if "qweight" in own and settings["quant_method"] == "awq":
            converter = AutoAWQConverter(group_size=GROUP, zero_point=True)
            parts = (own["qweight"], own["scales"].float(), own["qzeros"])
            codes, scale, zero = converter._convert_gemm_module(*parts)
            scale, zero = (t.repeat_interleave(GROUP, 1) for t in (scale, zero))
            own = {"weight": (codes.float() - zero) * scale}
        elif "qweight" in own:
            inputs = own["qweight"].shape[0] * 8
            layer = QuantLinear(4, GROUP, inputs, own["qweight"].shape[1], False)
            layer.qweight, layer.qzeros = own["qweight"], own["qzeros"]
            layer.scales = own["scales"].float()
            layer.post_init()
            own = {"weight": layer(torch.eye(inputs)).T.contiguous()}
        found |= {f"{module}.{n}": t.float() for n, t in own.items()}
    return found


def tensors(folder: Path) -> dict[str, torch.Tensor]:
    """All of a checkpoint."""
    return {n: t for f in sorted(folder.rglob("*.safetensors")) for n, t in load_file(f).items()}


def main() -> None:
    """Write both."""
    model, scheme, out = sys.argv[1], sys.argv[2], Path(sys.argv[3])
    packed = out / "packed"
    if scheme in ("gptq", "awq"):
        by_auto_round(model, scheme, out / "whole")
        next((out / "whole").glob("*/config.json")).parent.rename(packed)
    else:
        by_llm_compressor(model, scheme, packed)
    shutil.copytree(model, out / "plain", ignore=shutil.ignore_patterns("*.safetensors*"))
    plain = unrounded(packed) if scheme in ("gptq", "awq") else decompressed(packed)
    save_file(plain, out / "plain" / "model.safetensors", {"format": "pt"})


if __name__ == "__main__":
    main()
