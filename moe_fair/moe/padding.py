"""Unequal results padded to one number of experts, for engines that know one number for all layers.

A slot that is added has weights of zero, and its router's selection bias is -1e4: it is never
chosen, and what the others give is not changed. Exact, and only for routers that have such a bias
(DeepSeek-V3, GLM-4, gpt-oss and others); the result is as large as if every layer were the largest.
"""

from __future__ import annotations

import json
import re
import shutil
import struct
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from moe_fair.core.layout import COUNTS
from moe_fair.engines.shard_writer import write_shards
from moe_fair.engines.shards import INDEX, Piece, StoredTensor, checkpoint_tensors, shard_files
from moe_fair.moe.blocks import layer_index

NEVER = -1e4  # far below what scores and logits of routers differ by
# what only an unequal result's config has
OURS = (
    "auto_map", "moe_fair", "model_file", "per_layer_config",
    "allow_global_per_layer_attribute_access",
)  # fmt: skip
IN_LAYER = re.compile(r"^(?!mtp\.)(?:.*\.)?layers\.(\d+)\.(.+)$")
ONE_EXPERT = re.compile(r"^(.*\bexperts\.)(\d+)(\..+)$")


@dataclass(frozen=True)
class Padding:
    """A result as it shall lie on disk with every layer at one number of experts.

    Attributes:
        folder: of the result.
        config: of the stock class.
        experts: in every layer.
        tensors: those of the result, with the number of slots that each gets; expert tensors that
            are stored one by one have None and are copied for their slots.
        added: name of a new tensor -> the stored one whose form it has.
        bias: name of the selection bias in a layer.
    """

    folder: Path
    config: dict[str, Any]
    experts: int
    tensors: dict[str, tuple[StoredTensor, int]]
    added: dict[str, StoredTensor]
    bias: str

    @property
    def bytes(self) -> tuple[int, int]:
        """Of the result, and padded."""
        before = sum(t.bytes for t, _ in self.tensors.values())
        slots = sum(t.bytes // t.shape[0] * n for t, n in self.tensors.values() if n)
        return before, before + slots + sum(t.bytes for t in self.added.values())


def plan_padding(folder: Path) -> Padding:
    """What padding a result takes; reads its config and the headers of its files alone.

    Raises:
        ValueError: its router has no selection bias, or picks groups of experts first.
    """
    config = json.loads((folder / "config.json").read_bytes())
    inner = config.get("text_config")
    home = inner if isinstance(inner, dict) else config
    if (home.get("n_group") or 1) > 1:
        raise ValueError(
            f"{folder}: its routers pick groups of experts first, which padding would change"
        )
    ours = config["moe_fair"]
    counts = {layer_index(n): c for n, c in (ours["experts"] | ours.get("mtp", {})).items()}
    tensors = {t.name: t for t in checkpoint_tensors(folder, shard_files(folder))}
    forms: dict[str, dict[int, StoredTensor]] = defaultdict(dict)
    single: dict[int, list[StoredTensor]] = defaultdict(list)
    for name, t in tensors.items():
        found = IN_LAYER.match(name)
        if found is None or (layer := int(found[1])) not in counts:
            continue
        if ONE_EXPERT.match(name):
            single[layer].append(t)
        else:
            forms[found[2]][layer] = t
    by_expert = {s: own for s, own in forms.items() if _has_expert_axis(own, counts)}
    biases = [
        s for s, own in by_expert.items()
        if "bias" in s.rsplit(".", 1)[-1] and all(len(t.shape) == 1 for t in own.values())
    ]  # fmt: skip
    if len(biases) != 1 or {*forms[biases[0]]} != {*counts}:
        raise ValueError(
            f"{folder}: its routers have no selection bias, by which slots could be left unchosen"
        )
    most = max(counts.values())
    slots = {t.name: most - counts[layer] for own in by_expert.values() for layer, t in own.items()}
    return Padding(
        folder,
        _stock(config, most),
        most,
        {n: (t, slots.get(n, 0)) for n, t in tensors.items()},
        dict(_copies(single, counts, most)),
        biases[0],
    )


def write_padded(padding: Padding, folder: Path) -> None:
    """Write the padded checkpoint into an empty folder: weights, config, tokenizer."""
    filler = folder / "filler"
    largest = max(t.bytes for t, _ in padding.tensors.values())
    with filler.open("wb") as f:
        f.truncate(largest * padding.experts)  # zeros, which take no room on most disks
    never: dict[str, Path] = {}
    written = []
    for t, slots in padding.tensors.values():
        if not slots:
            written.append(t)
            continue
        row = t.bytes // t.shape[0]
        source = filler
        if t.name.endswith(f".{padding.bias}"):
            source = never.setdefault(t.dtype, folder / f"never.{t.dtype}")
            source.write_bytes(_number(t.dtype) * padding.experts)
        more = Piece(source, 0, row * slots)
        shape = (t.shape[0] + slots, *t.shape[1:])
        written.append(replace(t, shape=shape, pieces=(*t.pieces, more)))
    for name, t in padding.added.items():
        written.append(replace(t, name=name, pieces=(Piece(filler, 0, t.bytes),)))
    write_shards(written, folder)
    for path in (filler, *never.values()):
        path.unlink()
    (folder / "config.json").write_text(json.dumps(padding.config, indent=2) + "\n")
    for path in padding.folder.iterdir():
        left = path.suffix in (".safetensors", ".py", ".md") or path.name in (INDEX, "config.json")
        if path.is_file() and not path.is_symlink() and not left:
            shutil.copyfile(path, folder / path.name)


def _has_expert_axis(own: Mapping[int, StoredTensor], counts: Mapping[int, int]) -> bool:
    """The first axis is as long as the layer has experts, in layers that have different numbers."""
    if {t.shape for t in own.values()} == {next(iter(own.values())).shape}:
        return False
    return all(t.shape and t.shape[0] == counts[layer] for layer, t in own.items())


def _copies(
    single: Mapping[int, list[StoredTensor]], counts: Mapping[int, int], most: int
) -> dict[str, StoredTensor]:
    """Of experts that are stored one by one: name of each new slot's tensor -> one of its form."""
    added: dict[str, StoredTensor] = {}
    for layer, own in single.items():
        for t in own:
            start, number, end = ONE_EXPERT.match(t.name).groups()  # type: ignore[union-attr]
            if number == "0":
                added |= {f"{start}{i}{end}": t for i in range(counts[layer], most)}
    return added


def _stock(config: Mapping[str, Any], count: int) -> dict[str, Any]:
    """The config of the stock class, with this number of experts."""
    plain = {k: v for k, v in config.items() if k not in OURS}
    inner = plain.get("text_config")
    if isinstance(inner, dict):
        plain["text_config"] = inner = {k: v for k, v in inner.items() if k not in OURS}
    home = inner if isinstance(inner, dict) else plain
    home.update({n: count for n in COUNTS if isinstance(home.get(n), int)})
    return plain


def _number(dtype: str) -> bytes:
    """NEVER in a data type of a bias.

    Raises:
        ValueError: it is none of those that biases have.
    """
    whole = struct.pack("<f", NEVER)
    forms = {"F32": whole, "BF16": whole[2:], "F16": struct.pack("<e", NEVER)}
    if dtype not in forms:
        raise ValueError(f"a selection bias of type {dtype} is not known; it is F32, BF16 or F16")
    return forms[dtype]
