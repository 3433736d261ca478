"""Writing a pruned checkpoint that loads anywhere.

A uniform result is the stock format. Layers with unequal counts need the short modeling file of
`modeling_pruned.py`, which travels inside; `per_layer_config`, transformers' own coming format, is
written as well. Everything goes to a temporary sibling first and is renamed at the end.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from moe_fair.engines.names import destinations
from moe_fair.engines.shards import write_shards
from moe_fair.moe.file_surgery import classify, cut_tensors
from moe_fair.moe.load import Checkpoint
from moe_fair.moe.own_code import MODELING_CLASS, MODELING_FILE, is_ours, modeling_source
from moe_fair.moe.surgery import check_all

COUNT_KEYS = ("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts")
# files that come along as they are
COMPANIONS = (
    "tokenizer*", "vocab*", "merges*", "special_tokens_map.json", "added_tokens.json", "*.model",
    "*.tiktoken", "chat_template*", "generation_config.json", "preprocessor_config.json",
    "processor_config.json", "LICENSE*", "NOTICE*",
)  # fmt: skip


def write_model(
    source: Checkpoint,
    kept: Mapping[str, Sequence[int]],
    folder: Path,
    advance: Callable[[int], None] = lambda _: None,
) -> None:
    """Write the pruned weights, config, modeling file and companions into `folder`.

    Bytes are copied from shard to shard; memory does not depend on the model's size.

    Args:
        kept: block name -> ids that stay.
        advance: told the number of bytes after each copy.

    Raises:
        ValueError: the plan does not fit the model, or the checkpoint's layout is unknown.
    """
    check_all(source.blocks, kept)
    find = destinations(source.skeleton)
    names = {t.name: find(t.name).name for t in source.tensors}
    parts = classify(source.tensors, names, source.blocks)
    counts = {b.name: len(kept.get(b.name, range(b.num_experts))) for b in source.blocks}
    folder.mkdir(parents=True, exist_ok=True)
    write_shards(cut_tensors(source.tensors, parts, kept), folder, advance=advance)
    _write_config(source, counts, folder)
    for pattern in COMPANIONS:
        for file in source.path.glob(pattern):
            shutil.copyfile(file, folder / file.name)


def _write_config(source: Checkpoint, counts: Mapping[str, int], folder: Path) -> None:
    config = json.loads((source.path / "config.json").read_text())
    key = count_key(source.config)
    for name in ("moe_fair", "per_layer_config", "allow_global_per_layer_attribute_access"):
        config.pop(name, None)  # of an earlier pruning
    stock = next(c for c in type(source.skeleton).__mro__ if c.__name__ != MODELING_CLASS)
    if config.get("auto_map") is not None and is_ours(source.path):
        del config["auto_map"]
    config["architectures"] = [stock.__name__]
    if len(set(counts.values())) == 1:
        home = config.get("text_config") if key not in config else config
        assert isinstance(home, dict)
        home[key] = next(iter(counts.values()))
    else:
        layers = {b.layer: counts[b.name] for b in source.blocks}
        config |= _unequal(key, counts, layers)
        (folder / MODELING_FILE).write_text(modeling_source(stock))
    (folder / "config.json").write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")


def _unequal(key: str, counts: Mapping[str, int], layers: Mapping[int, int]) -> dict[str, Any]:
    return {
        "architectures": [MODELING_CLASS],
        "auto_map": {"AutoModelForCausalLM": f"{MODELING_FILE[:-3]}.{MODELING_CLASS}"},
        "moe_fair": {"experts": dict(counts)},
        "per_layer_config": {str(i): {key: n} for i, n in sorted(layers.items())},
        # the stock class still reads the model-wide number while it is built
        "allow_global_per_layer_attribute_access": True,
    }


def count_key(config: Any) -> str:
    """The config's own name for the number of routed experts.

    Raises:
        ValueError: none of the known names is there.
    """
    plain = config.get_text_config().to_dict()
    for key in COUNT_KEYS:
        if isinstance(plain.get(key), int):
            return key
    raise ValueError(
        f"{config.model_type}: the config has none of {', '.join(COUNT_KEYS)} to write the new "
        "number of experts to"
    )
