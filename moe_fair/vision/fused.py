"""Units whose parts lie in one layer: heads of a fused attention, hidden units of a gated MLP.

timm's transformers compute [q of every head, k of every head, v of every head] in one layer, and
the attention counts its heads itself: a head leaves with its three blocks of rows, its columns of
the projection behind, and one of the count. A gated MLP computes [gate of every unit, value of
every unit]. Both are guessed from a module's parts, since a trace follows neither; the mask check
(`proof`) decides.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from torch import nn

# a module's attributes that are the number of channels of all heads
WIDTHS = ("attn_dim", "all_head_dim", "inner_dim")


def fused_attentions(model: nn.Module) -> Iterator[tuple[str, int, int]]:
    """Name, number of heads and channels per head of every module that looks like one."""
    for name, module in model.named_modules():
        heads: Any = getattr(module, "num_heads", None)
        qkv = getattr(module, "qkv", None)
        projection = getattr(module, "proj", None)
        if not isinstance(qkv, nn.Linear) or not isinstance(projection, nn.Linear):
            continue
        width = projection.in_features
        own = [*module.parameters(recurse=False), *module.buffers(recurse=False)]
        several = isinstance(heads, int) and heads > 1 and not width % heads
        if several and not own and qkv.out_features == 3 * width:  # as many key heads as others
            yield name, int(heads), width // int(heads)


def head_rows(heads: int, width: int) -> tuple[tuple[int, ...], ...]:
    """[heads][3 width]: the rows of `qkv` that are a head's."""
    return tuple(
        tuple((part * heads + h) * width + i for part in range(3) for i in range(width))
        for h in range(heads)
    )


def head_columns(heads: int, width: int) -> tuple[tuple[int, ...], ...]:
    """[heads][width]: the columns of the projection that read a head."""
    return tuple(tuple(range(h * width, (h + 1) * width)) for h in range(heads))


def gated_mlps(model: nn.Module) -> Iterator[tuple[str, str, int]]:
    """The first and the second layer, and the number of hidden units, of what looks like one."""
    for name, module in model.named_modules():
        layers = [(n, m) for n, m in module.named_children() if isinstance(m, nn.Linear)]
        if len(layers) == 2:
            (first, wide), (second, narrow) = layers
            if wide.out_features == 2 * narrow.in_features:
                before = f"{name}." if name else ""
                yield before + first, before + second, narrow.in_features


def cut_heads(module: nn.Module, name: str, ids: Sequence[int]) -> None:
    """Count so many heads fewer; the layers are cut by cuts of their own.

    Raises:
        ValueError: the module has not these heads, or has no others.
    """
    heads = getattr(module, "num_heads", None)
    if not isinstance(heads, int) or not set(ids) < set(range(heads)):
        raise ValueError(f"{name}: cannot take {len(ids)} heads out of its {heads}")
    width: Any = getattr(module, "head_dim", None)
    for attribute in WIDTHS if isinstance(width, int) else ():
        if getattr(module, attribute, None) == heads * width:
            setattr(module, attribute, (heads - len(ids)) * width)
    module.num_heads = heads - len(ids)  # type: ignore[assignment]
