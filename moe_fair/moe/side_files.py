"""What lies beside the weights of a published model, and what of it goes along with a result.

Everything does, in folders too, except what would be wrong or run beside fewer experts: weights in
any format and their indices, other copies of the model, states of a training, metadata of a
quantisation that is gone, the base model's README, hidden files, and code. Code that the tokenizer
or a processor names goes along with what it imports: without it the result could not read text.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

from moe_fair.core.manifest import FOLDER
from moe_fair.moe.blocks import COUNTERS
from moe_fair.moe.trusted_code import OUR_FILES

# in any format; the patterns hold for a file's name, in whatever folder it lies
WEIGHTS = (
    "*.safetensors", "*.bin", "*.pt", "*.pth", "*.ckpt", "*.h5", "*.msgpack", "*.onnx",
    "*.onnx_data", "*.gguf", "*.ggml", "*.npz", "*.npy", "*.ot", "*.pkl", "*.pickle", "*.tflite",
    "*.mlmodel", "*.nemo", "*.distcp", "*.engine", "*.index.json", "*.index.json.gz",
)  # fmt: skip
# folders that hold another copy of the model, or what a training left
COPIES = (
    "original", "metal", "onnx", "gguf", "openvino", "coreml", "mlx*", "tensorrt*", "tf", "flax",
    "consolidated*", "global_step*", "checkpoint-*", "runs", "wandb", FOLDER,
)  # fmt: skip
# files of another copy (`params.json` is the config of consolidated weights), of an adapter or a
# training
OTHERS = (
    "consolidated*", "params.json", "adapter_*", "optimizer*", "scheduler*", "rng_state*",
    "trainer_state.json", "training_args*", "events.out.tfevents*", "latest", "zero_to_fp32.py",
)  # fmt: skip
QUANTISATION = ("hf_quant_config.json", "quantize_config.json", "quant_config.json")
SHOWN = 3  # names of one reason in the line that tells what was left
WRITTEN = ("config.json", *OUR_FILES)
# that name code: file -> auto classes whose code is needed to read what the model is given
READERS = ("tokenizer_config.json", "processor_config.json", "preprocessor_config.json",
           "video_preprocessor_config.json")  # fmt: skip
READER_CLASSES = (
    "AutoTokenizer", "AutoProcessor", "AutoImageProcessor", "AutoVideoProcessor",
    "AutoFeatureExtractor",
)  # fmt: skip


@dataclass(frozen=True)
class SideFiles:
    """Files by their path in the checkpoint's folder.

    Attributes:
        kept: they go along.
        left: path -> why it stays behind, of what a user might look for in the result.
    """

    kept: tuple[str, ...]
    left: Mapping[str, str]


def side_files(folder: Path, packed: bool) -> SideFiles:
    """What goes along with a result and what stays behind, of everything beside the weights.

    Args:
        packed: the weights are quantised, and so will those of the result be.
    """
    code = reader_code(folder)
    kept: list[str] = []
    left: dict[str, str] = {}
    for path in _files(folder):
        name = path.as_posix()
        if any(p.startswith(".") for p in path.parts) or _is_readme(path) or name in WRITTEN:
            continue
        why = _why_left(path, packed)
        if why is None and path.suffix == ".json" and _counts_experts(folder / path):
            why = "it tells how many experts there were"
        if why is None and path.suffix == ".py" and name not in code:
            why = "code that nothing needs which reads text or images"
        if why is None and not _inside(folder, folder / path):
            why = "a link to a file outside the checkpoint, or to none"
        if why is None:
            kept.append(name)
        elif why:
            left[name] = why
    return SideFiles(tuple(kept), left)


def in_a_line(files: SideFiles) -> str | None:
    """In a line, what of the original does not go along; None where everything does."""
    reasons: dict[str, list[str]] = {}
    for name, why in files.left.items():
        reasons.setdefault(why, []).append(name)
    if not reasons:
        return None
    parts = [f"{_some(names)} ({why})" for why, names in reasons.items()]
    return f"left behind: {'; '.join(parts)}"


def _some(names: list[str]) -> str:
    shown = ", ".join(names[:SHOWN])
    return shown if len(names) <= SHOWN else f"{shown} and {len(names) - SHOWN} more"


def reader_code(folder: Path) -> set[str]:
    """The code files that the tokenizer and the processors name, and what these import."""
    found: set[str] = set()
    for name, classes in (*((r, None) for r in READERS), ("config.json", READER_CLASSES)):
        for module in _named_modules(folder / name, classes):
            file = folder / f"{module}.py"
            if file.is_file():
                from transformers.dynamic_module_utils import get_relative_import_files

                needed = [str(file), *get_relative_import_files(file)]
                found |= {Path(f).relative_to(folder).as_posix() for f in needed}
    return found


def needs_code(folder: Path) -> str | None:
    """The code that the tokenizer is, as `tokenizer_config.json` names it; None where it is not."""
    return next(iter(_named_modules(folder / "tokenizer_config.json")), None)


def _named_modules(file: Path, classes: Collection[str] | None = None) -> Iterator[str]:
    """Modules of the checkpoint, not those of others, that a config's `auto_map` names.

    Args:
        classes: those of these auto classes alone.
    """
    try:
        named: Any = json.loads(file.read_text()).get("auto_map") or {}
    except (OSError, ValueError, AttributeError):
        return
    named = named if isinstance(named, dict) else {"AutoTokenizer": named}
    for entry in (v for k, v in named.items() if classes is None or k in classes):
        for reference in entry if isinstance(entry, list) else [entry]:
            if isinstance(reference, str) and "." in reference and "--" not in reference:
                yield reference.rpartition(".")[0].replace(".", "/")


def _files(folder: Path) -> list[Path]:
    """Relative paths of all files, links among them, in the order of their names."""
    return sorted(
        p.relative_to(folder) for p in folder.rglob("*") if p.is_symlink() or not p.is_dir()
    )


def _why_left(path: Path, packed: bool) -> str | None:
    """Why a file does not go along: "" where nobody would look for it; None where it does."""
    if any(fnmatch(part, p) for part in path.parts[:-1] for p in COPIES):
        return "" if path.parts[0] == FOLDER else "another copy of the model"
    if any(fnmatch(path.name, p) for p in WEIGHTS):
        return "" if len(path.parts) == 1 else "weights in a folder of their own"
    if any(fnmatch(path.name, p) for p in OTHERS):
        return "of another copy, an adapter or a training"
    if not packed and path.name in QUANTISATION:
        return "of a quantisation that the weights do not have"
    return None


def _counts_experts(file: Path) -> bool:
    """A config of another copy of the model."""
    try:
        found = json.loads(file.read_text())
    except (OSError, ValueError, RecursionError):
        return False
    return isinstance(found, dict) and any(
        name in part
        for part in (found, *found.values())
        if isinstance(part, dict)
        for name in COUNTERS
    )


def _is_readme(path: Path) -> bool:
    """The base model's card: the result has its own."""
    return len(path.parts) == 1 and path.stem.upper() == "README"


def _inside(folder: Path, path: Path) -> bool:
    """A file, or a link to one within the checkpoint or the Hub's cache of its repository."""
    if not path.is_file():
        return False
    home = folder.resolve()
    cached = home.parent.name == "snapshots"
    return path.resolve().is_relative_to(home.parent.parent if cached else home)
