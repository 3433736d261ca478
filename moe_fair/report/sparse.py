"""A page that shows where the zeros went."""

from __future__ import annotations

import html
from pathlib import Path
from typing import Any

import numpy as np

from moe_fair.report import vision_page as page


def write_report(path: Path, result: dict[str, Any]) -> None:
    """Write the page.

    Args:
        result: as in `result.json`.
    """
    s, top, sparsity = result["settings"], result["top1"], result["sparsity"]
    title = f"{s['model']}: {s['sparsity']:.2%} of the weights at zero"
    facts = [
        ("top-1, dense", f"{top['dense']:.2%}"),
        ("top-1, pruned", f"{top['pruned']:.2%}"),
        (f"top-1, repair {s['repair']}", f"{top['final']:.2%}"),
        ("zeros", f"{sparsity['zeros']:,} of {sparsity['weights']:,} weights"),
        ("all parameters", f"{sparsity['parameters']:,}"),
    ]
    measured = any("rr" in x for x in result["layers"])
    header = ["layer", "shape", "weights", "kept", "sparsity"]
    header += ["damage", "after repair", "RR"] if measured else []
    parts = [
        f"<h1>{html.escape(title)}</h1>",
        f"<p class=note>{html.escape(s['allocate'])} on {html.escape(s['data'])}</p>",
        page.table(("", ""), facts),
        "<h2>Layers</h2>",
        page.image(sparsity_figure(result)),
        page.table(header, [_row(x) for x in result["layers"]]),
    ]
    if measured:
        parts.append(
            "<p class=note>Damage: squared error of the layer's output over its square, when it "
            "alone is pruned to the wanted sparsity; after repair: the same with every channel's "
            "mean and variance matched; RR: what is left.</p>"
        )
    if result["left_dense"]:
        parts += [
            "<h2>Left dense</h2>",
            page.table(("layer", "why"), list(result["left_dense"].items())),
        ]
    head = "<!doctype html><html lang=en><meta charset=utf-8><title>moe-fair</title><style>"
    path.write_text(f"{head}{page.STYLE}</style>{''.join(parts)}</html>\n")


def sparsity_figure(result: dict[str, Any]) -> Any:
    """Each layer's share of weights that are left, on a logarithmic axis, and the mean of all."""
    layers = result["layers"]
    figure, axes = page.axes(1, height=max(2.0, 0.22 * len(layers) + 1.2))
    y = np.arange(len(layers))
    share = np.array([max(x["kept"], 0.5) / x["weights"] for x in layers])
    axes.hlines(y, 1e-9, share, color="#d9dfe6", lw=1)
    axes.plot(share, y, "o", color="#2b6cb0", ms=5)
    mean = 1 - result["sparsity"]["zeros"] / result["sparsity"]["weights"]
    axes.axvline(mean, color="#c05621", lw=1, label=f"all layers: {mean:.2%}")
    axes.set_yticks(y, [f"{x['name']}  ({x['weights']:,})" for x in layers], fontsize=7)
    axes.invert_yaxis()
    axes.set_xscale("log")
    axes.set_xlim(share.min() / 2, 1.15)
    axes.xaxis.set_major_formatter(lambda value, _: f"{100 * value:g} %")
    axes.set_xlabel("share of the layer's weights that is left")
    figure.legend(loc="outside upper center", frameon=False, fontsize=8)
    return figure


def _row(layer: dict[str, Any]) -> list[str]:
    shape = " × ".join(str(n) for n in layer["shape"])
    row = [layer["name"], shape, f"{layer['weights']:,}", f"{layer['kept']:,}"]
    row.append(f"{layer['sparsity']:.2%}")
    return row + [f"{layer[k]:.3f}" for k in ("raw", "residual", "rr") if k in layer]
