"""Writing a pruned checkpoint that loads anywhere.

A uniform result is the stock format. Layers with unequal counts need the short modeling file of
`modeling_pruned.py`, which travels inside; `per_layer_config`, transformers' own coming format, is
written as well. Everything goes to a temporary sibling first and is renamed at the end.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from moe_fair.moe.load import Checkpoint
from moe_fair.moe.own_code import MODELING_CLASS, MODELING_FILE, modeling_source
from moe_fair.moe.surgery import cut

COUNT_KEYS = ("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts")
# files that come along as they are
COMPANIONS = (
    "tokenizer*", "vocab*", "merges*", "special_tokens_map.json", "added_tokens.json", "*.model",
    "*.tiktoken", "chat_template*", "generation_config.json", "preprocessor_config.json",
    "processor_config.json", "LICENSE*", "NOTICE*",
)  # fmt: skip


def check_output(path: Path) -> None:
    """The directory can be written.

    Raises:
        ValueError: it is a file, or a directory with something in it.
    """
    if path.exists() and not path.is_dir():
        raise ValueError(f"output {path} is a file; give a new or empty directory")
    if path.is_dir() and any(path.iterdir()):
        raise ValueError(f"output directory {path} is not empty; give another, or remove it first")


def partial_path(path: Path) -> Path:
    """The sibling in which a run works until it is whole."""
    return path.with_name(path.name + ".partial")


def fresh(folder: Path) -> Path:
    """An empty directory; what an interrupted run left there goes."""
    if folder.exists():
        shutil.rmtree(folder)
    folder.mkdir(parents=True)
    return folder


def settle(folder: Path, output: Path) -> None:
    """Give a whole result its final name."""
    if output.exists():
        output.rmdir()  # empty: `check_output` saw to it
    folder.rename(output)


def write_model(source: Checkpoint, kept: Mapping[str, Sequence[int]], folder: Path) -> None:
    """Cut the model and write weights, config, modeling file and companions into `folder`.

    Args:
        kept: block name -> ids that stay.

    Raises:
        ValueError: the plan does not fit the model.
    """
    model = source.load(dtype="checkpoint", device="cpu")
    counts = {b.name: b.num_experts for b in source.blocks}
    cut(model, kept)
    counts |= {name: len(ids) for name, ids in kept.items()}
    key = count_key(model.config)
    uniform = len(set(counts.values())) == 1
    if uniform:
        setattr(model.config.get_text_config(), key, next(iter(counts.values())))
    folder.mkdir(parents=True, exist_ok=True)
    model.save_pretrained(folder)
    for shard in folder.glob("*.safetensors"):
        shard.chmod((folder / "config.json").stat().st_mode)  # the writer makes them private
    if not uniform:
        layers = {b.layer: counts[b.name] for b in source.blocks}
        _describe_unequal(folder, type(model), key, counts, layers)
    for pattern in COMPANIONS:
        for file in source.path.glob(pattern):
            shutil.copyfile(file, folder / file.name)


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


def _describe_unequal(
    folder: Path, stock: type, key: str, counts: Mapping[str, int], layers: Mapping[int, int]
) -> None:
    path = folder / "config.json"
    config = json.loads(path.read_text())
    config["architectures"] = [MODELING_CLASS]
    config["auto_map"] = {"AutoModelForCausalLM": f"{MODELING_FILE[:-3]}.{MODELING_CLASS}"}
    config["moe_fair"] = {"experts": dict(counts)}
    config["per_layer_config"] = {str(i): {key: n} for i, n in sorted(layers.items())}
    # the stock class still reads the model-wide number while it is built
    config["allow_global_per_layer_attribute_access"] = True
    path.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")
    (folder / MODELING_FILE).write_text(modeling_source(stock))
