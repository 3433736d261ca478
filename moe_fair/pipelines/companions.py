"""A pruned checkpoint's code, config and the files beside its weights, against the original's.

Nothing here asks how the result was written: the config may differ in the few keys that a plan
changes, and these must say what the plan says; every other key and file is the original's, or a
file that moe_fair writes.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from fnmatch import fnmatch
from pathlib import Path
from typing import TYPE_CHECKING, Any

from moe_fair.core.manifest import FOLDER, MANIFEST, MODEL_CARD, WRITTEN_LATER, same_bytes
from moe_fair.core.units import RESULT_FILE, STATISTICS_FILE
from moe_fair.engines.auto import auto_class
from moe_fair.engines.packing import QUANTISED
from moe_fair.engines.shards import INDEX
from moe_fair.engines.stock import read_config
from moe_fair.moe.blocks import COUNTERS
from moe_fair.moe.expert_lists import REPEATED
from moe_fair.moe.side_files import QUANTISATION, READER_CLASSES, reader_code
from moe_fair.moe.trusted_code import (
    MLX_FILE,
    MODELING_CLASS,
    MODELING_FILE,
    OUR_FILES,
    REFERENCE,
    changed,
    code_files,
    not_ours,
)

if TYPE_CHECKING:  # imports transformers; what can be refused without it is
    from moe_fair.moe.checkpoint_source import Checkpoint

ABSENT = object()
LAYERS, LAYERS_ALLOWED = "per_layer_config", "allow_global_per_layer_attribute_access"
# layers for multi-token prediction, whose experts may leave with their whole layer
MTP_COUNTS = (
    "num_nextn_predict_layers", "num_mtp_layers", "num_mtp_modules", "mtp_num_hidden_layers",
)  # fmt: skip
# what a result is not complete without, where the original has it
REQUIRED = (
    "tokenizer*", "vocab*", "merges*", "special_tokens_map.json", "added_tokens.json", "*.model",
    "*.tiktoken", "chat_template*", "generation_config.json", "*preprocessor_config.json",
    "processor_config.json", "LICENSE*", "NOTICE*",
)  # fmt: skip
TOKENIZER = REQUIRED[:7]  # without which there is none
OF_RESULTS = (
    "plan.json", "recipe.yaml", RESULT_FILE, STATISTICS_FILE, "repair.json", "heal.json",
    "drafts.json",
    "self.jsonl", "self.yaml",
)  # fmt: skip
WRITTEN = tuple(f"{FOLDER}/{name}" for name in OF_RESULTS)
DOWNLOADED = (".gitattributes", ".cache/huggingface/*")  # by the Hub and its client


def check_code(output: Path, original: Checkpoint | None, trusted: bool) -> str:
    """No code but our own, its tokenizer's and the original's comes with the checkpoint.

    Args:
        trusted: what else it brings may run.

    Returns, raises: as `check_config`.
    """
    config = read_config(output)
    readers = reader_code(output)
    others = [name for name in code_files(output) if name not in OUR_FILES]
    for name in others:
        theirs = original.home / name if original is not None else None
        known = theirs is not None and theirs.is_file() and same_bytes(output / name, theirs)
        if not known and (original is not None or name not in readers):
            raise ValueError(f"{name} is not a file that moe_fair writes")
    named = {k for k in config.get("auto_map") or {} if k not in READER_CLASSES}
    brought = bool(named) or (output / MODELING_FILE).exists()
    if brought and (wrong := changed(output) if trusted else not_ours(output)):
        raise ValueError(wrong)
    from moe_fair.moe.checkpoint_source import Checkpoint

    # the structure that the config stands for
    Checkpoint(str(output), trust_remote_code=trusted).blocks  # noqa: B018
    text = f"{MODELING_FILE} is unchanged" if brought else "none of moe_fair's, the stock format"
    return text + (f"; of the tokenizer's: {', '.join(others)}" if others else "")


def check_config(
    counts: Mapping[str, int],
    original: Checkpoint,
    output: Path,
    heads: Mapping[str, int] | None = None,
    stored: str | None = None,
) -> str:
    """The config is the original's, but for what the plan changes, and that is as planned.

    Args:
        counts: block -> experts kept, of every block of a layer.
        heads: the same of heads for multi-token prediction that are still there.
        stored: what weights have become, where they are stored otherwise.

    Returns:
        what was found, in a line.

    Raises:
        ValueError: the first thing that is wrong.
    """
    old, new = (read_config(folder) for folder in (original.home, output))
    if stored is not None:
        from moe_fair.moe.conversion import plain_settings
        from moe_fair.pipelines.verify_converted import check_packing

        check_packing(stored, original, new)
        old, new = (dict(plain_settings(config)) for config in (old, new))
    _check_code(old, new, original)
    old.pop("model_file", None)
    _same("model_file", new.pop("model_file", None), _mlx_file(output))
    own = new.pop("moe_fair", None)
    again = old.pop("moe_fair", None) is not None  # the original was pruned before
    if own is not None:
        _same("moe_fair", own, _told(counts, original, heads))
    elif len(set(counts.values())) > 1:
        raise ValueError("config.json has one number of experts, and the plan has several")
    differing = _take_layers(old, new, counts, original, again)
    for path, before, after in _differences(old, new):
        key = ".".join(path)
        if not _allowed(path, before, after, counts):
            raise ValueError(f"config.json: {key} is {_said(after)}, not {_said(before)}")
        differing.append(key)
    differing += ["moe_fair"] if own is not None else []
    return f"the original's but for {', '.join(differing) or 'nothing'}"


def check_files_beside(output: Path, original: Checkpoint, found: Checkpoint) -> str:
    """Every file beside the weights is the original's or one that moe_fair writes; none is missing.

    Returns, raises: as `check_config`.
    """
    weights = {*(p.name for p in found.shards), INDEX}
    ours = {"config.json", *OUR_FILES, MODEL_CARD, MANIFEST, *WRITTEN, *weights}
    same, strange = 0, []
    for path in sorted(output.rglob("*")):
        name = path.relative_to(output).as_posix()
        if path.is_symlink() and path.is_dir():
            raise ValueError(f"{name} is a link to another folder")
        if path.is_dir() or name in ours or any(fnmatch(name, p) for p in WRITTEN_LATER):
            continue
        theirs = original.home / name
        if name.startswith(f"{FOLDER}/") or not theirs.is_file():
            if not any(fnmatch(name, p) for p in DOWNLOADED):
                strange.append(name)
        elif not same_bytes(path, theirs) and not _same_packing(path, theirs):
            raise ValueError(f"{name} differs from the original's")
        else:
            same += 1
    if strange:
        raise ValueError(f"neither the original's nor written by moe_fair: {', '.join(strange)}")
    for theirs in sorted(original.home.iterdir()):
        needed = theirs.is_file() and any(fnmatch(theirs.name, p) for p in REQUIRED)
        if needed and not (output / theirs.name).is_file():
            raise ValueError(f"{theirs.name} of the original is missing")
    return f"{same} files are the original's, {_check_tokenizer(original, found)}"


def _same_packing(path: Path, theirs: Path) -> bool:
    """A file that says how weights are packed differs in nothing but the numbers of experts."""
    if path.name not in QUANTISATION:
        return False
    try:
        old, new = (json.loads(p.read_text()) for p in (theirs, path))
    except ValueError:
        return False
    leaves = _differences(old, new, ("quantization_config",))
    return all(_allowed(where, before, after, {}) for where, before, after in leaves)


def _check_tokenizer(original: Checkpoint, found: Checkpoint) -> str:
    """The result's tokenizer loads, if the original's does."""
    if not any(fnmatch(p.name, t) for p in original.home.iterdir() for t in TOKENIZER):
        return "which has no tokenizer"
    try:
        vocabulary = original.tokenizer().get_vocab()
    except ValueError:
        return "whose tokenizer does not load here"
    if found.tokenizer().get_vocab() != vocabulary:
        raise ValueError("the tokenizer has another vocabulary than the original's")
    return "and the tokenizer loads"


def _check_code(old: dict[str, Any], new: dict[str, Any], original: Checkpoint) -> None:
    """The class that loads it is the stock class, or ours upon it; what says so is taken out."""
    named, before = new.pop("auto_map", None), old.pop("auto_map", None)
    kinds, stock = new.pop("architectures", None), old.pop("architectures", None)
    kind, published = new.pop("model_type", None), old.pop("model_type", None)
    if kind != published:
        _same("model_type", kind, original.config.model_type)
    # of the original's those that read text or images stay
    wanted = {k: v for k, v in (before or {}).items() if k in READER_CLASSES}
    if "moe_fair" in new:
        wanted[auto_class(original.config).__name__] = REFERENCE
    _same("auto_map", named, wanted or None)
    classes = type(original.skeleton).__mro__
    built = next(c.__name__ for c in classes if c.__name__ != MODELING_CLASS)
    if kinds != stock or MODELING_CLASS in (kinds or ()):
        _same("architectures", kinds, [built])


def _mlx_file(output: Path) -> str | None:
    """What `model_file` of the config is to name; results of before have no file for mlx-lm."""
    return MLX_FILE if (output / MLX_FILE).is_file() else None


def _told(
    counts: Mapping[str, int], original: Checkpoint, heads: Mapping[str, int] | None
) -> dict[str, Any]:
    """What the modeling file is told: the plan's counts, every tensor and number of a block."""
    return {
        "experts": dict(counts),
        **({"mtp": dict(heads)} if heads else {}),
        "tensors": {b.path(m, t): dim for b in original.blocks for m, t, dim in b.tensors()},
        "numbers": sorted({b.path(m, n) for b in original.blocks for m, n in b.numbers()}),
    }


def _take_layers(
    old: dict[str, Any],
    new: dict[str, Any],
    counts: Mapping[str, int],
    original: Checkpoint,
    again: bool,
) -> list[str]:
    """Take `per_layer_config` out of both where it is moe_fair's; its keys that have changed."""
    homes = [c["text_config"] if isinstance(c.get("text_config"), dict) else c for c in (old, new)]
    before, after = (home.get(LAYERS) for home in homes)
    if before == after or (before is not None and not again):
        return []  # what is not moe_fair's is compared like any other key
    for home in homes:
        allowed = home.pop(LAYERS_ALLOWED, True)
        home.pop(LAYERS, None)
    _same(LAYERS_ALLOWED, allowed, True)
    if after is not None:
        [key] = {k for layer in after.values() for k in layer} or {""}
        if key not in COUNTERS:
            raise ValueError(f"config.json: {LAYERS} sets {key}")
        layers = {b.layer: counts[b.name] for b in original.blocks}
        _same(LAYERS, after, {str(i): {key: n} for i, n in layers.items()})
    return [LAYERS]


def _allowed(path: tuple[str, ...], before: Any, after: Any, counts: Mapping[str, int]) -> bool:
    """A plan with these counts changes this leaf of the config in this way."""
    if path[-1] in COUNTERS and type(after) is int:
        return set(counts.values()) == {after}
    if path[-1] in MTP_COUNTS:
        least = type(after) is int and after == 0  # also where the class promises one by itself
        return least or (type(after) is int and type(before) is int and 0 <= after <= before)
    if path[-1] in REPEATED and isinstance(before, list) and isinstance(after, list):
        return len(after) == len(before) and set(after) <= {*before, max(counts.values())}
    if "expert" in path[-1] and isinstance(before, list) and isinstance(after, list):
        return after == before[: max(counts.values())]
    if any(name in path for name in QUANTISED):
        if isinstance(before, list) and isinstance(after, list):
            return {_unnumbered(x) for x in after} <= {_unnumbered(x) for x in before}
        return before is ABSENT or after is ABSENT  # a key that names an expert
    return False


def _unnumbered(item: Any) -> str:
    """A module's name without its numbers: of experts those that stay are numbered anew."""
    return re.sub(r"\d+", "*", json.dumps(item))


def _differences(
    old: Any, new: Any, path: tuple[str, ...] = ()
) -> Iterator[tuple[tuple[str, ...], Any, Any]]:
    """(path, before, after) of every leaf that differs; `1`, `1.0` and `true` are three things."""
    if isinstance(old, dict) and isinstance(new, dict):
        for key in sorted(old.keys() | new.keys()):
            yield from _differences(old.get(key, ABSENT), new.get(key, ABSENT), (*path, key))
    elif old is ABSENT or new is ABSENT or _text(old) != _text(new):
        yield path, old, new


def _same(name: str, found: Any, wanted: Any) -> None:
    for path, want, got in _differences(wanted, found):
        where = ".".join((name, *path))
        raise ValueError(f"config.json: {where} is {_said(got)}, not {_said(want)}")


def _text(value: Any) -> str:
    return json.dumps(value, sort_keys=True)


def _said(value: Any) -> str:
    return "absent" if value is ABSENT else _text(value)[:80]
