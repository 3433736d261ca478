"""Making a small checkpoint as it would lie on the Hub: published config, names, shards, files."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from places import MODEL
from safetensors.torch import load_file, save_file
from torch import Tensor

from moe_fair.engines.auto import auto_class
from moe_fair.engines.stock import stock_config

Tensors = dict[str, Tensor]
WORDS = 4096  # of the reference model's tokenizer
READERS = ("tokenizer.json", "tokenizer_config.json")


@dataclass(frozen=True)
class Layout:
    """A published layout.

    Attributes:
        name: of the model on the Hub that is laid out like this.
        config: its `config.json`, with small numbers.
        names: some names that its tensors have on the Hub.
        files: side files, path -> content.
        travels: of them those that go along with a result.
        stored: from the tensors as transformers names them for the Hub to those that are published.
        flags: what the command is given beside; pruning: `prune` alone.
        refused: words of the line with which it is refused before anything is measured.
        unrepaired: words of the line that says why it is not repaired.
        whole: some layers stay as they are, so that equal counts elsewhere are no stock format.
        architectures: of the result, where the published ones do not stay.
        seed: of the weights.
        needs: a package that it cannot be read without.
    """

    name: str
    config: dict[str, Any]
    names: tuple[str, ...] = ()
    files: Mapping[str, str] = field(default_factory=dict)
    travels: tuple[str, ...] = ()
    stored: Callable[[Tensors, dict[str, Any]], Tensors] | None = None
    flags: tuple[str, ...] = ()
    pruning: tuple[str, ...] = ()
    refused: str = ""
    unrepaired: str = ""
    needs: str = ""
    whole: bool = False
    dtype: torch.dtype = torch.bfloat16
    shards: int = 2


def lay_out(layout: Layout, folder: Path) -> Path:
    """The checkpoint in a new folder."""
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(layout.config, indent=2))
    tensors = _tensors(folder, layout.dtype)
    if layout.stored is not None:
        tensors = layout.stored(tensors, layout.config)
    missing = [n for n in layout.names if n not in tensors]
    assert not missing, (missing, sorted(tensors)[:40])
    write(tensors, folder, layout.shards)
    for name in READERS:
        shutil.copyfile(MODEL / name, folder / name)
    for name, text in layout.files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text)
    return folder


def write(tensors: Tensors, folder: Path, count: int) -> None:
    """So many shards with an index, or one file."""
    if count == 1:
        save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
        return
    names = list(tensors)
    where = {}
    for i in range(count):
        file = f"model-{i + 1:05d}-of-{count:05d}.safetensors"
        part = {n: tensors[n] for n in names[i::count]}
        save_file(part, folder / file, metadata={"format": "pt"})
        where |= dict.fromkeys(part, file)
    size = sum(t.numel() * t.element_size() for t in tensors.values())
    index = {"metadata": {"total_size": size}, "weight_map": where}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


def _tensors(folder: Path, dtype: torch.dtype) -> Tensors:
    """Random weights of the model that the config describes, under the names of the Hub."""
    config = _without_packing(stock_config(folder))
    torch.manual_seed(0)
    model = auto_class(config).from_config(config, dtype=torch.float32)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for p in model.parameters():
            scale = 0.08 if p.dim() >= 2 else 0.02
            p.add_(torch.randn(p.shape, generator=generator) * scale)
        for name, b in model.named_buffers():
            if "bias" in name and b.is_floating_point():
                b.add_(torch.randn(b.shape, generator=generator) * 0.05)
    model.save_pretrained(folder / "saved")
    tensors: Tensors = {}
    for file in sorted((folder / "saved").glob("*.safetensors")):
        tensors |= load_file(file)
    shutil.rmtree(folder / "saved")
    return {
        n: t if "bias" in n or not t.is_floating_point() else t.to(dtype)
        for n, t in tensors.items()
    }


def _without_packing(config: Any) -> Any:
    for part in (config, config.get_text_config()):
        if hasattr(part, "quantization_config"):
            del part.quantization_config
    return config
