"""Whether vLLM puts every byte of a packed checkpoint where it belongs, on any CPU.

    python eval/serving/check_vllm_load.py FOLDER...

Run in vLLM's own environment. vLLM runs packed experts on CPUs that have AMX alone; what it reads
is seen without: it is made to believe that there is AMX, and not to arrange weights for it. Each
checkpoint is loaded, and the parameters of its experts and linear maps are compared with the
checkpoint's tensors, bit for bit. Prints a line each: layers' counts, how many were compared.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any

os.environ |= {
    "VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_CPU_OMP_THREADS_BIND": "nobind", "HF_HUB_OFFLINE": "1",
    "VLLM_NO_USAGE_STATS": "1", "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
}  # fmt: skip
import torch
from safetensors.torch import load_file

torch.cpu._is_amx_tile_supported = lambda: True
JOINED = {
    "qkv_proj": ("q_proj", "k_proj", "v_proj"), "gate_up_proj": ("gate_proj", "up_proj"),
}  # fmt: skip
EXPERTS = {"w13_": ("gate_proj", "up_proj"), "w2_": ("down_proj",)}


def main() -> None:
    """A line for each."""
    import vllm
    from vllm.model_executor.model_loader import base_loader
    from vllm.v1.worker.cpu_model_runner import CPUModelRunner

    base_loader.process_weights_after_loading = lambda *_: None
    CPUModelRunner.warming_up_model = lambda self: None
    for name in sys.argv[1:]:
        folder = Path(name)
        model = vllm.LLM(
            model=name, dtype="bfloat16", enforce_eager=True, max_model_len=512, max_num_seqs=4,
            enable_prefix_caching=False, disable_log_stats=True,
        )  # fmt: skip
        stored = {k: t for f in folder.glob("*.safetensors") for k, t in load_file(f).items()}
        [said] = model.apply_model(lambda found, stored=stored: compared(found, stored))
        print(f"read by vLLM {vllm.__version__}: {folder}: {said}", flush=True)
        del model


def compared(model: Any, stored: dict[str, torch.Tensor]) -> str:
    """Compare; what was seen."""
    left, experts, linear, counts = set(stored), 0, 0, []
    parameters = ((n, p) for n, p in model.named_parameters() if not n.endswith("shape"))
    for name, p in parameters:
        home, _, last = name.rpartition(".")
        if ".experts." in name and last.startswith(tuple(EXPERTS)):
            start = next(s for s in EXPERTS if last.startswith(s))
            block = home.partition(".experts")[0]
            for e, got in enumerate(p.data):
                end = last.removeprefix(start)
                names = [f"{block}.experts.{e}.{j}.{end}" for j in EXPERTS[start]]
                if names[0] in stored:
                    same(name, got, [stored[n] for n in names])
                    left -= set(names)
                    experts += 1
            if last.startswith("w2_weight") and "scale" not in last:
                counts.append(len(p))
            continue
        module = home.rpartition(".")[2]
        names = [home.removesuffix(module) + j + "." + last for j in JOINED.get(module, (module,))]
        if all(n in stored for n in names) and p.dtype != torch.bfloat16:
            same(name, p.data, [stored[n] for n in names])
            linear += 1
        left -= set(names)
    missing = sorted(n for n in left if "shape" not in n and "rotary" not in n)
    assert not missing, missing[:3]
    return f"experts {counts}; {experts} parts of experts, {linear} of linear maps bitwise"


def same(name: str, got: torch.Tensor, parts: list[torch.Tensor]) -> None:
    """The parameter is these tensors, one under another; as it is, or transposed."""
    if parts[0].dim() < 2 or got.shape == torch.cat(parts).shape:
        wanted = torch.cat([t.reshape(-1) if t.dim() < 2 else t for t in parts]).reshape(got.shape)
    else:
        wanted = torch.cat(parts).T
    a, b = (t.contiguous().reshape(-1).view(torch.uint8) for t in (got, wanted.to(got.dtype)))
    assert torch.equal(a, b), (name, got.shape)


if __name__ == "__main__":
    main()
