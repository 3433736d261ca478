"""Rules for high-sparsity weight pruning on nets trained on digits, with and without repair.

    python eval/train_digits.py -o digits
    python eval/sparsity_table.py --nets digits -o sparsity.jsonl --plot eval/sparsity.png

Every (net, seed, rule, sparsity) is one line of the output file with its accuracies: `none` without
repair, `shrunk` with variance matching at its default shrinkage, and for the rules after `--plain`
`plain` without shrinkage. A run that is started again does what is missing; `--table` measures
nothing and prints the tables: mean ± standard deviation over seeds, [nets] where not all were
measured, and each rule's difference to ERK on the same nets after the repair.

The transition band lies where repaired ERK keeps between 95 % and 50 % of the dense accuracy, by
straight lines between the sparsities that were measured.
"""

from __future__ import annotations

import argparse
import copy
import json
import statistics
from collections import defaultdict
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import torch
from digits_table import _spread
from torch import Tensor, nn
from train_digits import add_data, fresh, opened

from moe_fair.vision.data import Data, draw
from moe_fair.vision.graph import logits
from moe_fair.vision.load import load_weights
from moe_fair.vision.sparse.layers import Net, find_layers, keep_largest
from moe_fair.vision.sparse.repair import SHRINKAGE, match_variance, moments
from moe_fair.vision.sparse.rules import rule

RULES = ["uniform", "global", "erk", "lamp", "tod", "rr", "rr-erk"]
SPARSITIES = [0.8, 0.9, 0.925, 0.95, 0.97, 0.98, 0.99]
REPAIRS = {"none": "no repair", "plain": "matched", "shrunk": "matched, shrunk"}
IMAGES = 128
UPPER, LOWER = 0.95, 0.5  # of the dense accuracy: the band
COLOURS = dict(
    zip(RULES, ["#7f7f7f", "#8c564b", "#1f77b4", "#2ca02c", "#9467bd", "#d62728", "#ff7f0e"],
        strict=True)
)  # fmt: skip
Row = dict[str, Any]


def main() -> None:
    """Measure what is missing, then print the tables."""
    args = _arguments()
    rows: list[Row] = []
    if args.output.exists():
        rows = [json.loads(line) for line in args.output.read_text().splitlines()]
    done = {_key(r) for r in rows}
    data = opened(args.data, args.images)
    files = [(*f.stem.rsplit("-", 1), f) for f in sorted(args.nets.glob("*.safetensors"))]
    for net, seed, file in [] if args.table else sorted(files, key=lambda f: int(f[1])):
        if (args.only and net not in args.only) or int(seed) >= args.seeds:
            continue
        wanted = [
            {"net": net, "seed": int(seed), "rule": r, "sparsity": s}
            for s in args.sparsities
            for r in args.rules
        ]
        wanted = [w for w in wanted if _key(w) not in done]
        model = fresh(net, int(seed), data)
        load_weights(model, file)
        model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]  # faster
        for row in _measure(model, data, wanted, args.plain):
            rows.append(row)
            with args.output.open("a") as f:
                f.write(json.dumps(row) + "\n")
            print(json.dumps(row), flush=True)
    tables(rows)
    if args.plot:
        plot(rows, args.plot)


def _measure(model: nn.Module, data: Data, wanted: list[Row], plain: list[str]) -> Iterator[Row]:
    if not wanted:
        return
    images = draw(data.train, IMAGES, wanted[0]["seed"])
    test = data.test.tensors()
    layers, _ = find_layers(model, images[:2])
    net, total = Net(model, layers, images, 128), sum(x.size for x in layers)
    dense, before = moments(model, layers, images), _accuracy(model, *test)
    for w in wanted:
        budget = rule(w["rule"]).allocate(net, total - round(w["sparsity"] * total))
        pruned = copy.deepcopy(model)
        keep_largest(pruned, budget.kept)
        found = {**w, "dense": before, "none": _accuracy(pruned, *test)}
        for kind, strength in (("plain", 0.0), ("shrunk", SHRINKAGE)):
            if kind == "shrunk" or w["rule"] in plain:
                repaired = copy.deepcopy(pruned)
                match_variance(repaired, dense, layers, images, shrinkage=strength)
                found[kind] = _accuracy(repaired, *test)
        density = {x.name: budget.kept[x.name] / x.size for x in layers}
        yield {**found, "density": {n: round(d, 5) for n, d in density.items()}}


def _accuracy(model: nn.Module, images: Tensor, labels: Tensor) -> float:
    with torch.inference_mode():
        named = torch.cat([logits(model, x).argmax(-1) for x in images.split(32)])
    return float((named == labels).double().mean())


def tables(rows: list[Row]) -> None:
    """Top-1 of every rule, and the paired differences to ERK."""
    for net in sorted({r["net"] for r in rows}):
        mine = [r for r in rows if r["net"] == net]
        found = _grouped(mine)
        sparsities = sorted({r["sparsity"] for r in mine})
        names = [n for n in RULES if any(r["rule"] == n for r in mine)]
        dense = {r["seed"]: r["dense"] for r in mine}
        band = _band(found, sparsities)
        said = f"{band[0]:.1%} to {band[1]:.1%}" if band else "not within what was measured"
        print(f"\n{net}: {len(dense)} nets, dense {_spread(list(dense.values()))} %; band: {said}")
        head = " | ".join(f"{s:.1%}" for s in sparsities)
        for kind, label in REPAIRS.items():
            print(f"\n| {label} | {head} |\n|{'---|' * (1 + len(sparsities))}")
            for n in names:
                if not any(kind in r for r in mine if r["rule"] == n):
                    continue
                cells = [_cell(found[n, s].values(), kind, len(dense)) for s in sparsities]
                print(f"| {n} | {' | '.join(cells)} |")
        print(f"\n| shrunk, minus ERK (nets ahead) | {head} |\n|{'---|' * (1 + len(sparsities))}")
        for n in names:
            if n != "erk":
                print(f"| {n} | {' | '.join(_against(found, n, s) for s in sparsities)} |")


def plot(rows: list[Row], file: Path) -> None:
    """Top-1 against sparsity: with repair drawn through, without it dotted; the band shaded."""
    from matplotlib.figure import Figure
    from matplotlib.lines import Line2D

    nets = sorted({r["net"] for r in rows})
    figure = Figure(figsize=(5.2 * len(nets), 4.2), layout="constrained")
    for axes, net in zip(figure.subplots(1, len(nets), squeeze=False)[0], nets, strict=True):
        mine = [r for r in rows if r["net"] == net]
        found, sparsities = _grouped(mine), sorted({r["sparsity"] for r in mine})
        if band := _band(found, sparsities):
            axes.axvspan(-_place(band[0]), -_place(band[1]), color="#f3ead2", zorder=0)
        for n in RULES:
            points = [s for s in sparsities if found[n, s]]
            x = [-_place(s) for s in points]
            for kind, style in (("shrunk", "-"), ("none", ":")):
                y = [[100 * r[kind] for r in found[n, s].values()] for s in points]
                mean = [statistics.mean(v) for v in y]
                axes.plot(x, mean, style, color=COLOURS[n], lw=1.5 if style == "-" else 0.9)
                if style == "-":
                    off = [statistics.stdev(v) if len(v) > 1 else 0.0 for v in y]
                    axes.errorbar(x, mean, off, fmt="none", ecolor=COLOURS[n], lw=0.7, capsize=2)
        axes.set_xticks([-_place(s) for s in sparsities], [f"{100 * s:g}" for s in sparsities])
        axes.set_title(net, fontsize=10)
        axes.set_xlabel("weights at zero, % (spaced by the logarithm of what is left)")
        axes.set_ylim(0, 102)
    figure.axes[0].set_ylabel("top-1, %")
    handles = [Line2D([], [], color=COLOURS[n], label=n) for n in RULES]
    handles += [
        Line2D([], [], color="k", ls=":", label="no repair"),
        Line2D([], [], color="#f3ead2", lw=8, label="transition band"),
    ]
    figure.legend(handles=handles, loc="outside lower center", ncols=5, frameon=False, fontsize=8)
    figure.savefig(file, dpi=120)


def _band(found: dict, sparsities: list[float]) -> tuple[float, float] | None:
    """Sparsities between which repaired ERK falls from UPPER to LOWER of the dense accuracy."""
    points = []
    for s in sparsities:
        rows = list(found["erk", s].values())
        if not rows:
            return None
        points.append(statistics.mean(r["shrunk"] / r["dense"] for r in rows))
    ends = [_crossing(sparsities, points, level) for level in (UPPER, LOWER)]
    return (ends[0], ends[1]) if ends[0] is not None and ends[1] is not None else None


def _crossing(x: list[float], y: list[float], level: float) -> float | None:
    for a, b, above, below in zip(x, x[1:], y, y[1:], strict=False):
        if above >= level > below:
            return a + (b - a) * (above - level) / (above - below)
    return None


def _place(sparsity: float) -> float:
    return float(torch.tensor(1 - sparsity).log10())


def _grouped(rows: list[Row]) -> dict[tuple[str, float], dict[int, Row]]:
    found: dict[tuple[str, float], dict[int, Row]] = defaultdict(dict)
    for r in rows:
        found[r["rule"], r["sparsity"]][r["seed"]] = r
    return found


def _against(found: dict, name: str, sparsity: float) -> str:
    mine, erk = found[name, sparsity], found["erk", sparsity]
    gaps = [mine[s]["shrunk"] - erk[s]["shrunk"] for s in sorted(set(mine) & set(erk))]
    if not gaps:
        return "-"
    return f"{100 * statistics.mean(gaps):+.1f} ({sum(g > 0 for g in gaps)}/{len(gaps)})"


def _cell(rows: Iterable[Row], kind: str, nets: int) -> str:
    values = [r[kind] for r in rows if kind in r]
    if not values:
        return "-"
    return _spread(values) + (f" [{len(values)}]" if len(values) < nets else "")


def _key(row: Row) -> tuple:
    return row["net"], row["seed"], row["rule"], row["sparsity"]


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--nets", type=Path, default=Path("digits"), help="of train_digits.py")
    add_data(parser)
    parser.add_argument("--only", nargs="+", help="names of nets")
    parser.add_argument("--rules", nargs="+", default=RULES)
    parser.add_argument("--plain", nargs="+", default=["erk", "lamp", "rr"])
    parser.add_argument("--sparsities", type=float, nargs="+", default=SPARSITIES)
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--table", action="store_true", help="print the tables, measure nothing")
    parser.add_argument("--plot", type=Path, help="also draw them, as PNG or SVG")
    parser.add_argument("-o", "--output", type=Path, required=True)
    return parser.parse_args()


if __name__ == "__main__":
    main()
