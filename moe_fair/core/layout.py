"""A checkpoint as an engine sees it, read from its `config.json` alone."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from moe_fair.core.engine_facts import Layout

# names under which configs keep the number of routed experts, and the widths of one
COUNTS = ("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts")
WIDTHS = ("hidden_size", "moe_intermediate_size")
HEADS = "num_attention_heads"
OTHER_WIDTH = "intermediate_size"  # of an expert, where the config has none for experts alone


def read_layout(folder: Path) -> Layout:
    """The layout of a checkpoint on disk, pruned or not, by moe_fair or not.

    Raises:
        ValueError: the folder has no config, or that of a model without routed experts.
    """
    try:
        config = json.loads((folder / "config.json").read_bytes())
    except (OSError, ValueError, RecursionError) as e:
        raise ValueError(
            f"{folder}: config.json cannot be read ({' '.join(str(e).split())}); give the folder "
            "of a transformers checkpoint"
        ) from e
    if not isinstance(config, dict):
        raise ValueError(f"{folder}: config.json holds no settings")
    try:
        return layout_of(config)
    except ValueError as e:
        raise ValueError(f"{folder}: {e}") from e


def layout_of(config: Mapping[str, Any]) -> Layout:
    """The layout that a published config describes.

    Raises:
        ValueError: it says nothing of routed experts.
    """
    inner = config.get("text_config")
    home = inner if isinstance(inner, dict) else config
    counts = _counts(config, home)
    if not counts:
        raise ValueError(
            f"config.json has none of {', '.join(COUNTS)}: no mixture of experts, or one of a kind "
            "that is not known"
        )
    names = [n for n in WIDTHS if isinstance(home.get(n), int)]
    if WIDTHS[1] not in names and isinstance(home.get(OTHER_WIDTH), int):
        names.append(OTHER_WIDTH)
    quantised = config.get("quantization_config") or home.get("quantization_config")
    return Layout(
        model_type=str(config.get("model_type")),
        counts=counts,
        equal=len({*counts}) == 1,
        widths={n: home[n] for n in names},
        quantised=bool(quantised),
        heads=home[HEADS] if isinstance(home.get(HEADS), int) else 0,
    )


def parallel_sizes(layout: Layout) -> list[int]:
    """Numbers of devices that divide every layer's experts evenly, rising."""
    return common_divisors(layout.counts)


def tensor_parallel_sizes(layout: Layout, multiple: int = 1) -> list[int]:
    """Numbers of devices that divide the attention's heads and an expert's width, rising.

    Args:
        multiple: what a device's share of the width must be, as groups of quantised weights.
    """
    width = next((w for n, w in layout.widths.items() if n != WIDTHS[0]), 0)
    if not layout.heads or not width or width % multiple:
        return []
    return common_divisors((layout.heads, width // multiple))


def common_divisors(counts: Sequence[int]) -> list[int]:
    """Every number that divides all of the counts, rising."""
    greatest = math.gcd(*counts)
    return [n for n in range(1, greatest + 1) if greatest % n == 0]


def _counts(config: Mapping[str, Any], home: Mapping[str, Any]) -> tuple[int, ...]:
    """Routed experts of every layer that has any; of a stock config one number for all."""
    ours = config.get("moe_fair")
    if isinstance(ours, dict) and isinstance(ours.get("experts"), dict):
        return tuple(ours["experts"].values())
    for name in COUNTS:
        layers = home.get("per_layer_config")
        if isinstance(layers, dict):
            own = [v[name] for v in layers.values() if isinstance(v, dict) and name in v]
            if own:
                return tuple(own)
    # nested, as dbrx keeps it in `ffn_config`
    folders = [home, *(v for v in home.values() if isinstance(v, dict))]
    for folder in folders:
        for name in COUNTS:
            if isinstance(folder.get(name), int) and folder[name] > 1:
                return (folder[name],)
    return ()
