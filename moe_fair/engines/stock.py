"""The class of transformers that serves a published config, whatever code lies beside the weights.

Many checkpoints name code of their own in `auto_map` although transformers has had their class for
long, and some carry another model type than the architecture that they are. The stock class comes
first: it is the one whose experts are known, and nothing of the checkpoint has to be run.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

# published types that are another type's architecture under a name of their own
RENAMED = {"kimi_k2": "deepseek_v3"}


def stock_type(config: Mapping[str, Any]) -> str | None:
    """The type of transformers' own that a published config stands for; None where there is none.

    Args:
        config: as it lies in `config.json`.
    """
    from transformers import CONFIG_MAPPING

    published = config.get("model_type")
    kind = RENAMED.get(published, published) if isinstance(published, str) else None
    return kind if kind in CONFIG_MAPPING else None


def read_config(folder: Path) -> dict[str, Any]:
    """`config.json` as it lies there.

    Raises:
        ValueError: there is none, or it is no JSON object.
    """
    try:
        found = json.loads((folder / "config.json").read_text())
    except (OSError, ValueError, RecursionError) as e:
        raise ValueError(f"config.json cannot be read: {' '.join(str(e).split())}") from e
    if not isinstance(found, dict):
        raise ValueError("config.json holds no settings")
    return found


def stock_config(folder: Path) -> Any:
    """A checkpoint's config as the stock class reads it, without what names other code.

    Raises:
        ValueError: transformers has no class for its model type, or cannot use the config.
    """
    import transformers
    from transformers import CONFIG_MAPPING, AutoConfig

    raw = read_config(folder)
    kind = stock_type(raw)
    if kind is None:
        raise ValueError(
            f"transformers {transformers.__version__} has no class for model type "
            f"{raw.get('model_type')!r}, and models that run their own code alone are not pruned; "
            "a newer transformers may have it"
        )
    if kind != raw["model_type"]:
        raw["model_type"] = kind
        config = CONFIG_MAPPING[kind].from_dict(raw, name_or_path=str(folder))
    else:
        config = AutoConfig.from_pretrained(folder, trust_remote_code=False)
    if hasattr(config, "auto_map"):
        del config.auto_map
    return config
