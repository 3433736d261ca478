"""What `moe-fair vision sparsify` prints."""

from __future__ import annotations

import json

from rich.table import Table

from moe_fair.cli.terminal import console as new_console
from moe_fair.core.printable import printable
from moe_fair.pipelines.sparse import Sparse

BAR = 20  # columns


def show(done: Sparse) -> None:
    """Sparsity per layer, and how good the model is."""
    console = new_console()
    result = done.result
    s, top, layers = result["settings"], result["top1"], result["layers"]
    measured = any("rr" in x for x in layers)
    table = Table(box=None, header_style="bold", pad_edge=False)
    for name in ("layer", "weights", "kept", "sparsity", *(("RR",) if measured else ())):
        table.add_column(name, justify="left" if name == "layer" else "right")
    table.add_column("kept of all")
    for x in layers:
        full = round(x["kept"] / x["weights"] * BAR)
        table.add_row(
            printable(x["name"] if len(x["name"]) <= 40 else "…" + x["name"][-39:]),
            f"{x['weights']:,}",
            f"{x['kept']:,}",
            f"{x['sparsity']:.2%}",
            *((f"{x['rr']:.3f}",) if measured else ()),
            "█" * full + "░" * (BAR - full),
        )
    console.print(table)
    total = result["sparsity"]
    console.print(
        f"\n{total['zeros']:,} of {total['weights']:,} weights are zero "
        f"({total['zeros'] / total['weights']:.4%}), {s['allocate']}",
        soft_wrap=True,
    )
    for name, why in result["left_dense"].items():
        console.print(f"left dense: {printable(name)}, {printable(why)}", soft_wrap=True)
    nowhere = [x["name"] for x in layers if x.get("shift") == "nowhere"]
    if nowhere:
        console.print(
            f"note: the means of {len(nowhere)} layers could not be matched, they have no bias and "
            f"no batch normalisation reads them: {printable(', '.join(nowhere))}",
            soft_wrap=True,
        )
    repaired = f", {top['final']:.2%} after the repair" if s["repair"] != "none" else ""
    console.print(
        f"top-1: {top['dense']:.2%} dense, {top['pruned']:.2%} pruned{repaired}", soft_wrap=True
    )
    name = printable(done.output)
    console.print(
        f'\n{name}: load it with moe_fair.vision.load_pruned("{name}"); '
        f"{name}/moe_fair/report.html shows the layers",
        soft_wrap=True,
    )


def as_json(done: Sparse) -> str:
    """The result for scripts."""
    return json.dumps({"output": str(done.output), **done.result}, indent=1)
