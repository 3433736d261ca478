"""What is said of a run that set weights of an image classifier to zero: a report, and a screen."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from moe_fair.report import channel_figures
from moe_fair.report.document import Block, Document, Figure, Section, Table, Text, screen
from moe_fair.report.numbers import bar, clipped, loading


def document(result: dict[str, Any]) -> Document:
    """The report.

    Args:
        result: as in `result.json`.
    """
    s = result["settings"]
    parts: list[tuple[str, Iterable[Block]]] = [
        ("In short", [_facts(result), *_notes(result)]),
        ("Layers", _layers(result)),
    ]
    if result["left_dense"]:
        parts.append(("Left dense", [_dense(result)]))
    weights = result["sparsity"]["weights"]
    return Document(
        title=f"{s['model']}: {s['sparsity']:.2%} of {weights:,} weights at zero",
        subtitle=f"{s['allocate']} on {s['data']}",
        sections=tuple(Section(title, tuple(blocks)) for title, blocks in parts),
    )


def summary(result: dict[str, Any], output: Path) -> Document:
    """The screen: sparsity per layer, and how good the model is."""
    s, top, layers, total = (result[k] for k in ("settings", "top1", "layers", "sparsity"))
    more = ("RR",) if _measured(result) else ()
    header = ("layer", "weights", "kept", "sparsity", *more, "kept of all")
    rows = tuple(
        (clipped(x["name"]), *_counts(x), *((f"{x['rr']:.3f}",) if more else ()),
         bar(x["kept"] / x["weights"]))
        for x in layers
    )  # fmt: skip
    zeros = (
        f"{total['zeros']:,} of {total['weights']:,} weights are zero "
        f"({total['zeros'] / total['weights']:.4%}; of all parameters "
        f"{total['zeros'] / total['parameters']:.2%}), {s['allocate']}"
    )
    dense = [Text(f"left dense: {name}, {why}") for name, why in result["left_dense"].items()]
    repaired = f", {top['final']:.2%} after the repair" if s["repair"] != "none" else ""
    accuracy = Text(f"top-1: {top['dense']:.2%} dense, {top['pruned']:.2%} pruned{repaired}")
    return screen(
        [Table(header, rows, words=(0, len(header) - 1))],
        [Text(zeros), *dense, *_notes(result), accuracy],
        [loading(output, "the layers")],
    )


def _facts(result: dict[str, Any]) -> Table:
    s, top, sparsity = result["settings"], result["top1"], result["sparsity"]
    share = sparsity["zeros"] / sparsity["parameters"]
    return Table((), (
        ("top-1, dense", f"{top['dense']:.2%}"),
        ("top-1, pruned", f"{top['pruned']:.2%}"),
        (f"top-1, repair {s['repair']}", f"{top['final']:.2%}"),
        ("zeros", f"{sparsity['zeros']:,} of {sparsity['weights']:,} weights"),
        ("all parameters", f"{sparsity['parameters']:,}, {share:.2%} of them zero"),
    ))  # fmt: skip


def _notes(result: dict[str, Any]) -> Iterator[Text]:
    nowhere = [x["name"] for x in result["layers"] if x.get("shift") == "nowhere"]
    if nowhere:
        yield Text(
            f"the means of {len(nowhere)} layers could not be matched, they have no bias and "
            f"no batch normalisation reads them: {', '.join(nowhere)}",
            note=True,
        )


def _measured(result: dict[str, Any]) -> bool:
    """Damage and repair of every layer alone were."""
    return any("rr" in x for x in result["layers"])


def _layers(result: dict[str, Any]) -> Iterator[Block]:
    layers, total = result["layers"], result["sparsity"]
    picture = channel_figures.weights_left(
        [f"{x['name']}  ({x['weights']:,})" for x in layers],
        [max(x["kept"], 0.5) / x["weights"] for x in layers],
        1 - total["zeros"] / total["weights"],
    )
    yield Figure(
        "sparsity",
        picture,
        "Share of weights that are left in every layer, on a logarithmic axis",
        "What is left of every layer's weights, of which there were as many as stand in brackets.",
    )
    more = ("damage", "after repair", "RR") if _measured(result) else ()
    yield Table(
        ("layer", "shape", "weights", "kept", "sparsity", *more),
        tuple(
            (x["name"], " × ".join(map(str, x["shape"])), *_counts(x),
             *(f"{x[k]:.3f}" for k in ("raw", "residual", "rr") if more))
            for x in layers
        ),
    )  # fmt: skip
    if more:
        yield Text(
            "Damage: squared error of the layer's output over its square, when it alone is pruned "
            "to the wanted sparsity; after repair: the same with every channel's mean and variance "
            "matched; RR: what is left."
        )


def _counts(layer: dict[str, Any]) -> tuple[str, str, str]:
    return f"{layer['weights']:,}", f"{layer['kept']:,}", f"{layer['sparsity']:.2%}"


def _dense(result: dict[str, Any]) -> Table:
    return Table(("layer", "why"), tuple(result["left_dense"].items()), words=(0, 1))
