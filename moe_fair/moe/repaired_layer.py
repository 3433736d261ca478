"""The file of a repaired layer: what was changed, as a killed walk and the writer find it."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path

from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from moe_fair.engines.packing.experts import as_stored
from moe_fair.engines.shard_writer import write_shard
from moe_fair.moe.blocks import MoeBlock
from moe_fair.moe.layer_repair import LayerRepair
from moe_fair.moe.overlay import ORIGINAL, layer_file
from moe_fair.moe.repacking import PACKED, Repacking

REPAIR_FORMAT = "moe_fair.repair/2"


def save_repair(
    folder: Path,
    key: str,
    block: MoeBlock,
    done: LayerRepair,
    originals: Mapping[str, Tensor],
    packed: Mapping[str, Tensor],
) -> None:
    """Write what a repair made of a block's layer.

    Args:
        key: everything that the result depends on: plan, text, settings.
        originals: name in the model -> what a tensor was, of the first kept expert.
        packed: of a packed checkpoint, the changed tensors as they are stored.
    """
    path = layer_file(folder, block)
    changed = changed_tensors(block, done)
    tensors = {n: p.detach() for n, p in changed.items()}
    tensors |= {ORIGINAL + n: originals[n] for n in changed}
    tensors |= {PACKED + n: t for n, t in packed.items()}
    about = {"format": REPAIR_FORMAT, "key": key, "done": json.dumps(asdict(done))}
    temporary = path.with_suffix(".partial")
    # those of wide numbers first, so that each lies where its type may
    stored = sorted(tensors.items(), key=lambda x: -x[1].itemsize)
    write_shard([as_stored(n, t) for n, t in stored], temporary, metadata=about)
    temporary.rename(path)


def earlier_repair(folder: Path, key: str, block: MoeBlock) -> LayerRepair | None:
    """What a killed run with the same key did to this layer, put into the block."""
    path = layer_file(folder, block)
    if not path.is_file():
        return None
    try:
        with safe_open(path, framework="pt") as f:
            header = f.metadata() or {}
            if header.get("format") != REPAIR_FORMAT or header.get("key") != key:
                return None
            done = LayerRepair(**json.loads(header["done"]))
            new = {n: f.get_tensor(n) for n in changed_tensors(block, done)}
    except (SafetensorError, OSError, ValueError, TypeError):
        return None  # damaged: fitted again
    for name, p in changed_tensors(block, done).items():
        p.data.copy_(new[name])
    return done


def changed_tensors(block: MoeBlock, done: LayerRepair) -> dict[str, nn.Parameter]:
    """Name in the model -> parameter, of what a repair changed."""
    every = {f"{block.name}.{n}": p for n, p in block.block.named_parameters()}
    if done.epoch:
        return every
    if done.repair == "none":
        return {}
    down = ("down_proj", "down_proj_bias")
    changed = {id(p) for n, p in block.experts.named_parameters() if n in down}
    return {n: p for n, p in every.items() if id(p) in changed}


def put_merged(block: MoeBlock, folder: Path, repacking: Repacking | None) -> None:
    """Give a block that was cut what its experts are merged into, as the result will hold it."""
    path = layer_file(folder, block)
    if not path.is_file():  # of this layer none are
        return
    every = {f"{block.name}.{n}": p for n, p in block.block.named_parameters()}
    with safe_open(path, framework="pt") as f:
        for name in (n for n in f.keys() if not n.startswith(ORIGINAL)):  # noqa: SIM118
            values = f.get_tensor(name)
            if repacking is not None and name in repacking:
                values = repacking.pack(name, values)[0]
            every[name].data.copy_(values)
