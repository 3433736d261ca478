"""Where a model's files are, on disk or on the Hub, and digests of them."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path

from moe_fair.moe.folder_kind import local_folder
from moe_fair.moe.side_files import COPIES, WEIGHTS

SAMPLED = 64  # pages of a large shard that enter its digest
PAGE = 65536


def locate(model: str, revision: str | None, weights: str | None = None) -> Path:
    """The folder of a model; from the Hub with every file beside the weights.

    Args:
        weights: a pattern of root-level weights to bring too; None: none yet.
    """
    if (folder := local_folder(model)) is not None:
        return folder
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    # `*` matches `/` here: a copy in a folder, as `original/`, is not fetched with the weights
    left = [*(p for p in WEIGHTS if p != weights), *(f"{c}/*" for c in COPIES)]
    left = [p for p in left if p != "*.index.json"] + ["*/*.safetensors", "*/*.bin"]
    try:
        return Path(snapshot_download(model, revision=revision, ignore_patterns=left))
    except (LocalEntryNotFoundError, OSError, HfHubHTTPError, HFValidationError) as e:
        raise ValueError(
            f"{model}: no such local directory, and the Hub did not give it ({type(e).__name__}); "
            "check the name, the network and `hf auth login`, or give a local model directory"
        ) from e


def model_digest(config: Path, shards: Sequence[Path]) -> str:
    """Of a config, whichever way it is written, and of shards; a large one is sampled."""
    digest = hashlib.sha256(json.dumps(json.loads(config.read_text()), sort_keys=True).encode())
    for shard in shards:
        digest.update(_shard_digest(shard))
    return digest.hexdigest()


def tokenizer_digest(folder: Path) -> str:
    """Of the files of a tokenizer."""
    digest = hashlib.sha256()
    for file in sorted(folder.glob("tokenizer*")):
        digest.update(file.name.encode() + file.read_bytes())
    return digest.hexdigest()


def _shard_digest(path: Path) -> bytes:
    """Header, size and content; of a file over SAMPLED pages, evenly spread pages of it."""
    size = path.stat().st_size
    digest = hashlib.sha256(f"{path.name} {size}".encode())
    with path.open("rb") as f:
        if size <= SAMPLED * PAGE * 16:
            while chunk := f.read(PAGE * 16):
                digest.update(chunk)
        else:
            for i in range(SAMPLED):
                f.seek((size - PAGE) * i // (SAMPLED - 1))
                digest.update(f.read(PAGE))
    return digest.digest()
