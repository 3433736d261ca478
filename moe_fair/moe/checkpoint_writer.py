"""Writing a pruned checkpoint that loads anywhere.

A uniform result is the stock format. Layers with unequal counts need the short modeling file of
`modeling_pruned.py`, which travels inside; `per_layer_config`, transformers' own coming format, is
written as well. Everything goes to a temporary sibling first and is renamed at the end.
"""

from __future__ import annotations

import copy
import json
import shutil
import tempfile
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from moe_fair.core.quote import first_line
from moe_fair.engines.auto import auto_class
from moe_fair.engines.shard_writer import write_shards
from moe_fair.engines.stock import stock_type
from moe_fair.moe.blocks import COUNTERS, layer_index, rows_of
from moe_fair.moe.checkpoint_source import Checkpoint
from moe_fair.moe.conversion import Conversion
from moe_fair.moe.expert_lists import renumbered
from moe_fair.moe.mtp import settings_of
from moe_fair.moe.overlay import with_changes
from moe_fair.moe.repacking import Repacking
from moe_fair.moe.side_files import QUANTISATION, READER_CLASSES, SideFiles, side_files
from moe_fair.moe.surgery import check_all
from moe_fair.moe.table_surgery import new_tables, with_tables
from moe_fair.moe.tensor_slicing import cut_tensors
from moe_fair.moe.trusted_code import (
    MLX_FILE,
    MLX_TEMPLATE,
    MODELING_CLASS,
    MODELING_FILE,
    REFERENCE,
    modeling_source,
    naming_file,
)

LAYERS = "per_layer_config"


def write_model(
    source: Checkpoint,
    kept: Mapping[str, Sequence[int]],
    folder: Path,
    advance: Callable[[int], None] = lambda _: None,
    repaired: Path | None = None,
    drop_heads: bool = False,
    conversion: Conversion | None = None,
    merged: Path | None = None,
) -> SideFiles:
    """Write the pruned weights, config, modeling file and side files into `folder`.

    Bytes are copied from shard to shard; memory does not depend on the model's size.

    Args:
        kept: block name -> ids that stay.
        advance: told the number of bytes after each copy.
        repaired: folder of repaired layers whose tensors replace the original ones.
        drop_heads: leave out heads for multi-token prediction; else those that `kept` does not name
            stay whole.
        conversion: what the weights become on the way out; by default they are stored as they are.
        merged: folder of layers whose experts were merged, from which the repairs went on.

    Returns:
        what lay beside the original's weights and went along, and what did not.

    Raises:
        ValueError: the plan does not fit the model, or the checkpoint's layout is unknown.
    """
    check_all([*source.blocks, *source.heads.blocks], kept)
    folder.mkdir(parents=True, exist_ok=True)
    dropped = {t.name for t in source.heads.tensors} if drop_heads else set()
    repacking = None
    if source.packing is not None or conversion is not None:
        repacking = Repacking(source, kept, conversion, dropped)
    settings: Callable[[dict[str, Any]], dict[str, Any]] = copy.deepcopy
    if conversion is not None:
        assert repacking is not None
        plain = list(repacking.plain(cut_tensors(source.tensors, source.parts, kept)))
        settings = partial(conversion.config, stays=plain)
    _write_config(source, kept, folder, drop_heads, settings)
    changed = [folder for folder in (merged, repaired) if folder is not None]
    if changed:
        tensors = with_changes(source, kept, changed, repacking)
    else:
        tensors = cut_tensors(source.tensors, source.parts, kept)
        if conversion is not None:
            assert repacking is not None
            tensors = repacking.all_converted(tensors)
    with tempfile.TemporaryDirectory(prefix="moe_fair-tables-") as place:
        tensors = with_tables(tensors, new_tables(source, kept), Path(place))
        write_shards((t for t in tensors if t.name not in dropped), folder, advance=advance)
    beside = side_files(source.home, source.packing is not None and conversion is None)
    for name in beside.kept:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        if name in QUANTISATION:
            _write_packing(source, kept, folder, name)
        else:
            shutil.copyfile(source.home / name, folder / name)
    return beside


def _write_packing(
    source: Checkpoint, kept: Mapping[str, Sequence[int]], folder: Path, name: str
) -> None:
    """A file beside the config that says how weights are packed; lists of it name experts."""
    text = (source.home / name).read_text()
    try:
        said = json.loads(text)
    except ValueError:  # nothing reads it
        said = None
    if isinstance(said, dict):
        new = renumbered(said, source.parts, source.blocks, kept)
        text = text if new == said else json.dumps(new, indent=4) + "\n"
    (folder / name).write_text(text)


def check_writable(source: Checkpoint, unequal: bool) -> None:
    """A result can be described to transformers and opened again, whatever the plan will be.

    Args:
        unequal: the plan may keep other numbers in some layers than in others.

    Raises:
        ValueError: neither the stock class nor ours would have the shapes of the result, or ours
            would lie beside code that nobody has allowed.
    """
    fewer = {b.name: list(range(b.num_experts - b.n_group)) for b in source.blocks}
    some = {b.name: list(range(b.num_experts)) for b in source.blocks}
    some |= {b.name: fewer[b.name] for b in source.blocks[:1]}
    for kept in (fewer, some) if unequal else (fewer,):
        with tempfile.TemporaryDirectory(prefix="moe_fair-config-") as folder:
            _write_config(source, kept, Path(folder), drop_heads=True)
            brought = (Path(folder) / MODELING_FILE).exists()
        if brought and not source.trust_remote_code and (name := naming_file(source.home)):
            raise ValueError(
                f"{source.model}: {name} names code to be run, and beside it layers of different "
                "sizes would not be opened unasked; allow it with --trust-remote-code, take that "
                "entry out, or use --allocate uniform"
            )


def _write_config(
    source: Checkpoint,
    kept: Mapping[str, Sequence[int]],
    folder: Path,
    drop_heads: bool,
    settings: Callable[[dict[str, Any]], dict[str, Any]] = lambda config: config,
) -> None:
    """The stock config where the stock class can hold the result, else ours with its file.

    Args:
        settings: puts into the config how the result is stored.

    Raises:
        ValueError: neither gives a model with the shapes of the result.
    """
    # hash layers that an earlier run has cut, and this one leaves as they are
    counts = dict((source.published.get("moe_fair") or {}).get("experts", {}))
    counts |= {b.name: len(kept.get(b.name, range(b.num_experts))) for b in source.blocks}
    shapes = _shapes(source, kept)
    heads = _head_counts(source, kept) if source.heads.tensors and not drop_heads else None
    config = settings(_own_config(source, kept))
    if heads is None:
        _without_heads(config, source)
    if len({*counts.values(), *(heads or {}).values()}) == 1:
        _save(_stock_config(config, source, next(iter(counts.values()))), folder)
        if not _misfit(folder, shapes):
            return
    (folder / MODELING_FILE).write_text(modeling_source(_stock_class(source)))
    config["auto_map"] = {
        **config.get("auto_map", {}), auto_class(source.config).__name__: REFERENCE
    }  # fmt: skip
    config["moe_fair"] = _unequal_settings(source, counts, heads)
    if _home(config) is config:  # a text model
        shutil.copyfile(MLX_TEMPLATE, folder / MLX_FILE)
        config["model_file"] = MLX_FILE
    _save(_with_layers(config, source, counts), folder)
    if _misfit(folder, shapes):  # a family that reads per_layer_config in its own way
        _save(config, folder)
        wrong = _misfit(folder, shapes)
        if wrong:
            raise ValueError(
                f"{source.model}: layers of different sizes cannot be written: {wrong}"
            )


def _save(config: Mapping[str, Any], folder: Path) -> None:
    (folder / "config.json").write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")


def _shapes(source: Checkpoint, kept: Mapping[str, Sequence[int]]) -> dict[str, tuple[int, ...]]:
    """Name in the model -> shape after the cut, of every tensor that a checkpoint holds."""
    shapes = {n: tuple(t.shape) for n, t in source.skeleton.state_dict().items()}
    for b in source.blocks:
        for module, tensor, dim in b.tensors() if b.name in kept else ():
            name = f"{b.name}.{b.path(module, tensor)}"
            if name in shapes:
                old = shapes[name]
                length = len(rows_of(kept[b.name], old[dim], b.num_experts))
                shapes[name] = (*old[:dim], length, *old[dim + 1 :])
    return shapes


def _misfit(folder: Path, shapes: Mapping[str, tuple[int, ...]]) -> str:
    """What transformers would build otherwise from this folder's config; nothing where all fits."""
    try:
        state = Checkpoint(str(folder)).skeleton.state_dict()  # the modeling file is ours
    except (ValueError, RuntimeError) as e:
        return first_line(e)
    built = {n: tuple(t.shape) for n, t in state.items()}
    for name in sorted(built.keys() | shapes.keys()):
        if built.get(name) != shapes.get(name):
            return f"{name} is {built.get(name)} in the model and {shapes.get(name)} in the result"
    return ""


def _stock_class(source: Checkpoint) -> type:
    return next(c for c in type(source.skeleton).__mro__ if c.__name__ != MODELING_CLASS)


def _own_config(source: Checkpoint, kept: Mapping[str, Sequence[int]]) -> dict[str, Any]:
    """The source's config for the stock class, without what an earlier pruning wrote.

    What names code of a model goes, since the stock class has served; what names that of readers
    stays, and their files go along. Lists that name experts name those that stay.
    """
    config = copy.deepcopy(source.published)
    home, key = _home(config), count_path(source.config)[-1]
    for part in (config, home):
        named = part.pop("auto_map", None)
        readers = {k: v for k, v in (named or {}).items() if k in READER_CLASSES}
        if readers:
            part["auto_map"] = readers
    config.pop("model_file", None)  # code for mlx-lm
    config["model_type"] = stock_type(config)
    config["architectures"] = config.get("architectures") or [_stock_class(source).__name__]
    if config["architectures"] == [MODELING_CLASS]:  # as an earlier version wrote it
        config["architectures"] = [_stock_class(source).__name__]
    if config.pop("moe_fair", None) is not None and all(
        layer.keys() == {key} for layer in home.get(LAYERS, {}).values()
    ):
        for name in (LAYERS, "allow_global_per_layer_attribute_access"):
            home.pop(name, None)
    return renumbered(config, source.parts, source.blocks, kept)


def _home(config: dict[str, Any]) -> dict[str, Any]:
    """The part of a config that describes the language model."""
    inner = config.get("text_config")
    return inner if isinstance(inner, dict) else config


def _head_counts(source: Checkpoint, kept: Mapping[str, Sequence[int]]) -> dict[str, int]:
    """MoE block of a head -> experts in the result."""
    layers = [layer for h in source.heads.chain for layer in h.layers if layer.block]
    return {
        layer.block.name: len(kept.get(layer.block.name, range(layer.experts)))
        for layer in layers
        if layer.block is not None
    }


def _without_heads(config: dict[str, Any], source: Checkpoint) -> None:
    """Say in the config that there is no head, where it or its class promises one."""
    names = [(c, n) for c in (config, _home(config)) for n in settings_of(c)]
    text = source.config.get_text_config()
    if not names and getattr(text, "num_mtp_layers", None):  # the class's default
        names = [(_home(config), text.attribute_map.get("num_mtp_layers", "num_mtp_layers"))]
    for where, name in names:
        where[name] = 0


def _stock_config(config: dict[str, Any], source: Checkpoint, count: int) -> dict[str, Any]:
    """The config with the new number wherever it says how many routed experts there are."""
    config = copy.deepcopy(config)
    *folders, key = count_path(source.config)
    home = _home(config)
    for folder in folders:
        home = home.setdefault(folder, {})
    old = source.blocks[0].num_experts
    aliases = source.config.get_text_config().attribute_map
    names = {key} | {a for a, to in aliases.items() if to == key and a in home}
    names |= {n for n in COUNTERS if home.get(n) == old}
    home.update(dict.fromkeys(names, count))
    return config


def _unequal_settings(
    source: Checkpoint, counts: Mapping[str, int], heads: Mapping[str, int] | None
) -> dict[str, Any]:
    """What our modeling file reads in the config; `mtp`, which it does not, is for `verify`."""
    return {
        "experts": dict(counts),
        **({"mtp": dict(heads)} if heads else {}),
        "tensors": {b.path(m, t): dim for b in source.blocks for m, t, dim in b.tensors()},
        "numbers": sorted({b.path(m, n) for b in source.blocks for m, n in b.numbers()}),
    }


def _with_layers(
    config: dict[str, Any], source: Checkpoint, counts: Mapping[str, int]
) -> dict[str, Any]:
    """The config with `per_layer_config` as well, where the family has none of its own."""
    if _home(config).get(LAYERS):
        return config
    key = count_path(source.config)[-1]
    layers = {layer_index(name): n for name, n in counts.items()}
    extra = {
        LAYERS: {str(i): {key: n} for i, n in sorted(layers.items())},
        # the stock class still reads the model-wide number while it is built
        "allow_global_per_layer_attribute_access": True,
    }
    if _home(config) is config:
        return config | extra
    return config | {"text_config": config["text_config"] | extra}


def count_path(config: Any) -> tuple[str, ...]:
    """Where the language model's config keeps the number of routed experts.

    Raises:
        ValueError: none of the known names is there.
    """
    plain = config.get_text_config().to_dict()
    for key in COUNTERS:
        if isinstance(plain.get(key), int):
            return (key,)
    for folder, inner in plain.items():
        for key in COUNTERS if isinstance(inner, dict) else ():
            if isinstance(inner.get(key), int):
                return folder, key
    raise ValueError(
        f"{config.model_type}: the config has none of {', '.join(COUNTERS)} to write the new "
        "number of experts to"
    )
