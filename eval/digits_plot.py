"""A picture an architecture of what `digits_table.py` has measured.

    python eval/digits_plot.py characters.jsonl --title "characters" -o eval/characters

writes `eval/characters-NET.png`: top-1 over the share of channels removed, right after the cut and
after fine-tuning. A colour is a score, a line style how much each group gives; a point is the mean
over nets, its bar the standard deviation. Points of one share stand side by side; where there is
one share only, methods do, with a dash for every net.
"""

from __future__ import annotations

import argparse
import json
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure

COLOURS = {
    "u-score": "#1f5fa8", "l1": "#d95f0e", "taylor": "#2a9d5c", "random": "#8a8a8a",
    "torch-pruning": "#b0307a", "network-pruner": "#6a4c93",
}  # fmt: skip
NAMES = {
    "u-score": "U (Wasserstein)", "l1": "L1", "taylor": "Taylor", "random": "random",
    "torch-pruning": "Torch-Pruning's GroupTaylor", "network-pruner": "network-pruner",
}  # fmt: skip
STYLES = {"uniform": "--", "tod": "-", "global": ":", "": "-."}
APART = 0.03  # from the first method to the last
Row = dict[str, Any]


def main() -> None:
    """Draw every net."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("rows", type=Path, nargs="+", help="of digits_table.py")
    parser.add_argument("--title", default="")
    parser.add_argument("-o", "--output", required=True, help="start of the files' names")
    args = parser.parse_args()
    rows = [json.loads(line) for file in args.rows for line in file.read_text().splitlines()]
    rows = [r for r in rows if "failed" not in r]
    for net in sorted({r["net"] for r in rows}):
        mine = [r for r in rows if r["net"] == net]
        figure = picture(mine, f"{net}, {args.title}" if args.title else net)
        figure.savefig(f"{args.output}-{net}.png", metadata={"Software": None})


def picture(rows: Sequence[Row], title: str) -> Figure:
    """Two panels of one net."""
    figure = Figure(figsize=(9, 4.6), dpi=90, layout="constrained")
    dense = {r["seed"]: r["dense"] for r in rows}
    panels = [p for p in ("cut", "tuned") if any(p in r for r in rows)]
    for axes, panel in zip(figure.subplots(1, len(panels), squeeze=False)[0], panels, strict=True):
        _panel(axes, [r for r in rows if panel in r], panel)
        axes.axhline(100 * statistics.mean(dense.values()), color="black", lw=0.8)
        axes.set_title("right after the cut" if panel == "cut" else "after fine-tuning")
        axes.set(ylabel="top-1, %", ylim=(0, 1.05 * axes.get_ylim()[1]))
    if len({r["ratio"] for r in rows}) > 1:
        handles, labels = figure.axes[-1].get_legend_handles_labels()
        figure.legend(handles, labels, loc="outside lower center", ncols=4, fontsize=8)
    figure.suptitle(f"{title} (black: dense, {len(dense)} net{'s' * (len(dense) > 1)})")
    return figure


def _panel(axes: Axes, rows: Sequence[Row], panel: str) -> None:
    methods = sorted(
        {r["method"] for r in rows}, key=lambda m: (list(COLOURS).index(m.split("/")[0]), m)
    )
    one = len({r["ratio"] for r in rows}) == 1  # then methods stand side by side by their names
    for i, method in enumerate(methods):
        score, _, allocator = method.partition("/")
        shares = sorted({r["ratio"] for r in rows if r["method"] == method})
        found = [
            # a cut is measured once with each number of epochs
            list({
                r["seed"]: 100 * r[panel] for r in rows if (r["method"], r["ratio"]) == (method, s)
            }.values())
            for s in shares
        ]  # fmt: skip
        axes.errorbar(
            [i if one else 100 * (s + APART * (i / len(methods) - 0.5)) for s in shares],
            [statistics.mean(f) for f in found],
            [statistics.stdev(f) if len(f) > 1 else 0.0 for f in found],
            color=COLOURS[score],
            ls=STYLES[allocator],
            marker="o",
            ms=3,
            lw=1.2,
            elinewidth=0.7,
            label=", ".join(filter(None, (NAMES[score], allocator))),
        )
        if one:  # every net
            axes.plot([i] * len(found[0]), found[0], "_", color=COLOURS[score], ms=7)
    if one:
        axes.set_xticks(range(len(methods)), methods, rotation=60, ha="right", fontsize=7)
        axes.set_xlabel(f"{rows[0]['ratio']:.0%} of the channels removed")
    else:
        axes.set_xlabel("share of the channels removed, %")


if __name__ == "__main__":
    main()
