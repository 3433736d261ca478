"""The pictures of reports on channels and weights: groups of unequal size, by their names."""

from __future__ import annotations

from collections.abc import Sequence

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.cbook import boxplot_stats
from matplotlib.collections import LineCollection

from moe_fair.core.printable import printable
from moe_fair.report.figures import BLUE, ORANGE, RED, WIDTH, Curve, drawing
from moe_fair.report.numbers import clipped

Line = list[tuple[float, float]]  # its points

PALE = "#d9dfe6"
BOX = 0.6  # width, in groups
NAMED = 24  # groups whose names have room along an axis or in a legend
TALLEST = 200.0  # inches: of more layers than have room the names lie over each other


def kept_shares(
    labels: Sequence[str], kept: Sequence[float], null: Sequence[float] | None
) -> bytes:
    """Shares of every group's units that are kept and removed, one bar a group.

    Args:
        null: shares that unrelated rankings would leave, or None without a tolerance.
    """
    with drawing(WIDTH, _height(len(labels))) as (figure, done):
        axes = figure.subplots()
        y, share = np.arange(len(labels)), np.array(kept)
        axes.barh(y, share, color=BLUE, label="kept")
        axes.barh(y, 1 - share, left=share, color=PALE, label="removed")
        if null is not None:
            axes.plot(null, y, "|", color=RED, ms=9, mew=2, label="unrelated rankings")
        _rows(axes, labels)
        axes.set(xlim=(0, 1), xlabel="share of the group's units")
        figure.legend(loc="outside upper left", ncols=3)
    return done()


def tod_lines(curves: Sequence[Curve], tolerance: float | None) -> bytes:
    """ToD against the share removed, a line for each group; the dot is the cut.

    Lines have their names in the legend where there is room, else the first and the last have.
    """
    with drawing(WIDTH, 3.8) as (figure, done):
        axes = figure.subplots()
        colours = matplotlib.colormaps["viridis"](np.linspace(0, 0.9, len(curves)))
        named = range(len(curves)) if len(curves) <= NAMED else (0, len(curves) - 1)
        for i, (c, colour) in enumerate(zip(curves, colours, strict=True)):
            x = np.linspace(0, 1, len(c.tod))
            name = clipped(printable(c.label)) if i in named else None
            axes.plot(x, c.tod, color=colour, lw=1, label=name)
            axes.plot(x[c.depth], c.tod[c.depth], "o", color=colour, ms=4)
        axes.plot([0, 1], [0, 1], "--", color="#888", lw=1, label="unrelated rankings")
        axes.plot([], [], "o", color="#888", ms=4, label="depth chosen")
        if tolerance is not None:
            axes.axhline(tolerance, color=ORANGE, lw=1)
            axes.annotate(f"α = {tolerance:.3g}", (0.995, tolerance), ha="right", va="bottom",
                          color=ORANGE)  # fmt: skip
        axes.set(xlabel="share of the group removed (dark lines: first layers)", ylabel="ToD")
        figure.legend(loc="outside right upper", fontsize=7)
    return done()


def score_boxes(kinds: Sequence[tuple[str, Sequence[np.ndarray]]], names: Sequence[str]) -> bytes:
    """Distribution of each group's scores over the group's mean, one panel a kind of score.

    Args:
        kinds: title, and the scores of every group in the model's order.
        names: of the groups.
    """
    with drawing(WIDTH, 3.4) as (figure, done):
        [panels] = figure.subplots(1, len(kinds), squeeze=False)
        for axes, (title, groups) in zip(panels, kinds, strict=True):
            means = [np.abs(values).mean() for values in groups]
            shares = [v / m if m > 0 else v for v, m in zip(groups, means, strict=True)]
            _boxes(axes, shares)
            axes.set(title=printable(title), xlabel="group, in model order")
            places = np.arange(0, len(groups), max(1, -(-len(groups) // NAMED)))
            labels = [clipped(printable(names[int(p)])) for p in places]
            axes.set_xticks(places + 1, labels, rotation=90, fontsize=6)
        panels[0].set_ylabel("score / mean of the group")
    return done()


def _boxes(axes: Axes, values: Sequence[np.ndarray]) -> None:
    """The same picture as of `Axes.boxplot` with whiskers from 5 to 95 %, which draws every line by
    itself: of forty groups that takes a quarter of a second."""
    black: list[Line] = []
    orange: list[Line] = []
    for at, box in enumerate(boxplot_stats(list(values), whis=(5, 95)), 1):
        low, first, median, third, high = (box[n] for n in ("whislo", "q1", "med", "q3", "whishi"))
        left, right = at - BOX / 2, at + BOX / 2
        around = [(left, first), (right, first), (right, third), (left, third), (left, first)]
        black += [around, [(at, first), (at, low)], [(at, third), (at, high)]]
        black += [[(at - BOX / 4, y), (at + BOX / 4, y)] for y in (low, high)]
        orange.append([(left, median), (right, median)])
    for lines, colour, ends in ((black, "black", "projecting"), (orange, "C1", "butt")):
        paths = [np.array(line) for line in lines]
        axes.add_collection(LineCollection(paths, colors=colour, linewidths=1, capstyle=ends))
    axes.set_xlim(0.5, len(values) + 0.5)
    axes.autoscale_view(scalex=False)


def training_steps(losses: Sequence[float], left: Sequence[float]) -> bytes:
    """Training loss of every step, and the share of the multiply-adds that was left after it."""
    with drawing(WIDTH, 3.0) as (figure, done):
        [loss, work] = figure.subplots(1, 2)
        loss.plot(np.arange(1, len(losses) + 1), losses, "o-", color=BLUE, lw=1, ms=3)
        loss.set_ylabel("training loss")
        work.plot(np.arange(len(left) + 1), [1.0, *left], color=BLUE, marker=".")
        work.set(ylabel="multiply-adds left after it", ylim=(0, 1.02))
        for axes in (loss, work):
            axes.set_xlabel("step")
            axes.xaxis.get_major_locator().set_params(integer=True)
    return done()


def weights_left(labels: Sequence[str], share: Sequence[float], mean: float) -> bytes:
    """Each layer's share of weights that are left, on a logarithmic axis, and that of all."""
    with drawing(WIDTH, _height(len(labels))) as (figure, done):
        axes = figure.subplots()
        y = np.arange(len(labels))
        axes.hlines(y, 1e-9, share, color=PALE, lw=1)
        axes.plot(share, y, "o", color=BLUE, ms=5)
        axes.axvline(mean, color=ORANGE, lw=1, label=f"all layers: {mean:.2%}")
        _rows(axes, labels)
        axes.set_xscale("log")
        axes.set(xlim=(min(share) / 2, 1.15), xlabel="share of the layer's weights that is left")
        axes.xaxis.set_major_formatter(lambda value, _: f"{100 * value:g} %")
        figure.legend(loc="outside upper left")
    return done()


def _height(rows: int) -> float:
    return min(max(2.0, 0.22 * rows + 1.2), TALLEST)


def _rows(axes: Axes, labels: Sequence[str]) -> None:
    """One row a name, the first at the top."""
    axes.set_yticks(np.arange(len(labels)), list(map(printable, labels)), fontsize=7)
    axes.set_ylim(len(labels) - 0.4, -0.6)
