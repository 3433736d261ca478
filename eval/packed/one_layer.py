"""One layer of the real shape of a published packed model: read, scored, cut, repaired, written.

    python eval/packed/one_layer.py (deepseek-v3|kimi-k2) (packed|plain) [--experts 64]

Random weights, few tokens, one MoE layer and a small vocabulary around it; all of its experts (256,
384), or fewer. The streaming engine leaves the experts packed where the layer, unpacked, is larger
than what memory is usable. Scored in float32, as a CPU does by itself (its products of bfloat16
take a hundred times as long in the backward), repaired in bfloat16. Prints bytes on disk and, for
each stage, seconds, CPU seconds and the peak of anonymous memory (pages of mapped files do not
count) above what the imports take. `plain` is the same layer stored in bfloat16 and scored so, to
set beside it.
"""

from __future__ import annotations

import argparse
import json
import shutil
import tempfile
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from functools import cache
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor
from transformers import DeepseekV3Config, DeepseekV3ForCausalLM

from moe_fair.engines.batch import Batch
from moe_fair.engines.packing.experts import PackedExperts
from moe_fair.moe.blocks import find_blocks
from moe_fair.moe.checkpoint_source import Checkpoint
from moe_fair.moe.checkpoint_writer import write_model
from moe_fair.moe.collector import ExpertCollector
from moe_fair.moe.engine_choice import start, start_layerwise
from moe_fair.moe.repacking import Repacking
from moe_fair.moe.repair import Repairer
from moe_fair.moe.statistics import collecting, names_of

SEQUENCES, LENGTH = 10, 32
EXPERTS = {"deepseek-v3": 256, "kimi-k2": 384}
KIMI = {
    "quant_method": "compressed-tensors", "format": "pack-quantized",
    "quantization_status": "compressed", "ignore": ["lm_head", "re:.*self_attn.*"],
    "config_groups": {"group_0": {"targets": ["Linear"], "weights": {
        "num_bits": 4, "type": "int", "symmetric": True, "strategy": "group", "group_size": 32,
    }}},
}  # fmt: skip
DEEPSEEK = {
    "quant_method": "fp8", "fmt": "e4m3", "activation_scheme": "dynamic",
    "weight_block_size": [128, 128],
}  # fmt: skip


def config(kind: str, experts: int) -> DeepseekV3Config:
    """One layer with experts; Kimi-K2 is DeepSeek-V3's class with 64 heads and one group."""
    groups = {"n_group": 8, "topk_group": 4} if kind == "deepseek-v3" else {
        "n_group": 1, "topk_group": 1}  # fmt: skip
    return DeepseekV3Config(
        num_hidden_layers=1, first_k_dense_replace=0, vocab_size=1024, n_routed_experts=experts,
        num_attention_heads=128 if kind == "deepseek-v3" else 64,
        num_key_value_heads=128 if kind == "deepseek-v3" else 64,
        dtype="bfloat16", bos_token_id=0, eos_token_id=1, pad_token_id=2, **groups,
    )  # fmt: skip


def packed(kind: str, name: str, shape: tuple[int, ...], i: int) -> dict[str, Tensor]:
    """Codes and scales of the i-th matrix: random ones, in an order of its own."""
    rows, columns = shape
    home = name.removesuffix("weight")
    if kind == "deepseek-v3":
        scale = torch.full((-(-rows // 128), -(-columns // 128)), 0.02 / 100)
        codes = base(rows, columns, torch.float8_e4m3fn).view(torch.uint8).roll(i, 0)
        return {name: codes.view(torch.float8_e4m3fn), f"{name}_scale_inv": scale}
    return {
        f"{home}weight_packed": base(rows, columns // 8, torch.int32).roll(i, 0),
        f"{home}weight_shape": torch.tensor([rows, columns]),
        f"{home}weight_scale": torch.full((rows, columns // 32), 0.004).bfloat16(),
    }


@cache
def base(rows: int, columns: int, dtype: torch.dtype) -> Tensor:
    """What all matrices of a shape are made of."""
    if dtype == torch.int32:
        return torch.randint(-(2**31), 2**31 - 1, (rows, columns)).int()
    t = torch.randn(rows, columns)
    return (t * 0.02).to(dtype) if dtype == torch.bfloat16 else (t * 100).to(dtype)


def write(folder: Path, kind: str, experts: int, pack: bool) -> None:
    """The checkpoint, a shard at a time."""
    folder.mkdir(parents=True)
    torch.manual_seed(0)
    settings = config(kind, experts)
    with torch.device("meta"):
        model = DeepseekV3ForCausalLM(settings)
    settings.architectures = ["DeepseekV3ForCausalLM"]
    plain = settings.to_dict()
    if pack:
        plain["quantization_config"] = DEEPSEEK if kind == "deepseek-v3" else KIMI
    (folder / "config.json").write_text(json.dumps(plain))
    shapes: dict[str, tuple[int, ...]] = {}
    for name, p in model.state_dict().items():
        if name.endswith("experts.gate_up_proj"):
            for e in range(experts):
                for part in ("gate", "up"):
                    key = name.replace("gate_up_proj", f"{e}.{part}_proj.weight")
                    shapes[key] = (p.shape[1] // 2, p.shape[2])
        elif name.endswith("experts.down_proj"):
            for e in range(experts):
                shapes[name.replace("down_proj", f"{e}.down_proj.weight")] = p.shape[1:]
        else:
            shapes[name] = tuple(p.shape)
    index, shard, number = {}, {}, 0
    for i, (name, shape) in enumerate(shapes.items()):
        large = name.endswith("_proj.weight") or "_proj_with" in name or "a_proj" in name
        if not large:
            shard[name] = (torch.ones(shape) if "norm" in name else
                           torch.randn(shape) * 0.02).bfloat16()  # fmt: skip
        elif pack and (kind == "deepseek-v3" or ".experts." in name):
            shard |= packed(kind, name, shape, i)
        else:
            shard[name] = base(*shape, torch.bfloat16).roll(i, 0)
        size = sum(t.nbytes for t in shard.values())
        if size > 2e9 or i + 1 == len(shapes):
            file = f"model-{number:05d}.safetensors"
            save_file(shard, folder / file, {"format": "pt"})
            index |= dict.fromkeys(shard, file)
            shard, number = {}, number + 1
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": index}))


def anonymous() -> int:
    """Bytes of this process's anonymous memory."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return sum(int(x.split()[1]) * 1024 for x in lines if x.startswith("RssAnon"))


@contextmanager
def stage(name: str, base: int) -> Iterator[None]:
    """Time it and watch its memory."""
    peak, done = [0], threading.Event()

    def watch() -> None:
        while not done.wait(0.02):
            peak[0] = max(peak[0], anonymous())

    thread = threading.Thread(target=watch)
    thread.start()
    started, used = time.perf_counter(), time.process_time()
    try:
        yield
    finally:
        spent, used = time.perf_counter() - started, time.process_time() - used
        done.set()
        thread.join()
    held = max(0, peak[0] - base) / 1e9
    print(f"| {name} | {spent:.1f} s | {used:.1f} s | {held:.2f} GB |", flush=True)


def all_of(_: str, __: int | None, batches: Any) -> Any:
    """A pass without a bar."""
    return iter(batches)


def main() -> None:
    """Every stage."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("kind", choices=["deepseek-v3", "kimi-k2"])
    parser.add_argument("form", choices=["packed", "plain"])
    parser.add_argument("--experts", type=int)
    parser.add_argument("--repair", default="scale")
    parser.add_argument("--work", type=Path)
    args = parser.parse_args()
    args.experts = args.experts or EXPERTS[args.kind]
    work = Path(tempfile.mkdtemp(dir=args.work))
    torch.manual_seed(0)
    try:
        how = (work / "model", args.kind, args.experts, args.form == "packed")
        with ProcessPoolExecutor(1, get_context("spawn")) as other:  # whose memory is not ours
            other.submit(write, *how).result()
        run(work, f"{args.kind}, {args.form}, {args.experts} experts", args.repair)
    finally:
        shutil.rmtree(work)


def run(work: Path, title: str, repair: str) -> None:
    """Read, score, cut, repair, write."""
    base = anonymous()
    with stage("open", base):
        source = Checkpoint(str(work / "model"))
        kept = {b.name: list(range(0, b.num_experts, 2)) for b in source.blocks}
        assert source.groups
    ids = torch.randint(3, 1000, (SEQUENCES, LENGTH))
    batch = Batch(ids, torch.ones_like(ids), torch.arange(SEQUENCES), 0)
    print(f"{title}: {source.size.parameters / 1e9:.2f} B weights in "
          f"{source.size.bytes / 1e9:.2f} GB")  # fmt: skip
    with stage("read", base):
        dtype = "float32" if source.packing else "bfloat16"
        engine, model = start(source, "streaming", dtype, "cpu", all_of)
        with engine.layered.layer(0) as layer:  # type: ignore[attr-defined]
            unpacked = sum(p.nbytes for p in layer.parameters()) / 1e9
            packed = any(isinstance(p, PackedExperts) for p in layer.parameters())
    how = "experts stay packed" if packed else "unpacked whole"
    print(f"the layer is {unpacked:.2f} GB unpacked in {dtype}; {how}", flush=True)
    with stage("score", base):
        families = collecting(names_of("routing", "output_norms", "taylor"), backward=True)
        collector = ExpertCollector(find_blocks(model), source.groups, ("a",), families)
        with collector:
            engine.run([batch], collector)
    with stage("cut and write", base):
        write_model(source, kept, work / "cut")
    if repair == "none":
        return
    (work / "layers").mkdir()
    repacking = None if source.packing is None else Repacking(source, kept)
    with stage(f"repair ({repair})", base):
        layerwise = start_layerwise(source, "streaming", "bfloat16", "cpu", all_of)
        repairer = Repairer(layerwise, kept, repair, folder=work / "layers", repacking=repacking)
        [done] = repairer.run([batch])
    del layerwise, repairer
    shutil.rmtree(work / "cut")
    with stage(f"write what was repaired ({done.repair})", base):
        write_model(source, kept, work / "out", repaired=work / "layers")


if __name__ == "__main__":
    main()
