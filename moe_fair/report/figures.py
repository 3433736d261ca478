"""The pictures of a report, as PNG bytes. Nothing here knows experts: groups, units, scores.

The same numbers give the same bytes: no date, no global state of matplotlib, no display.
"""

from __future__ import annotations

import io
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import TwoSlopeNorm
from matplotlib.figure import Figure
from matplotlib.scale import SymmetricalLogTransform
from matplotlib.ticker import MaxNLocator
from PIL import Image

from moe_fair.core.printable import printable
from moe_fair.report.panels import Panels, Ticks

WIDTH = 10.4  # inches; shown at 100 pixels an inch, drawn at twice that
DPI = 200
BLUE, ORANGE, RED, GREY = "#2f6db5", "#d08b1d", "#c8322b", "#8a93a1"
STYLE: Any = {
    # a name with a dollar sign is a name, not a formula
    "text.parse_math": False,
    "font.family": "DejaVu Sans",
    "font.size": 9.0,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.titlesize": 9.0,
    "legend.frameon": False,
}
FOLD = 4.0  # routing maps end at 2^4 times even use, and at 2^-4


@dataclass(frozen=True)
class Marked:
    """Numbers of one group's units, and which of them left.

    Attributes:
        label: of the group, on the axis.
        values: [N].
        removed: ids.
    """

    label: str
    values: np.ndarray
    removed: Sequence[int]


@dataclass(frozen=True)
class Curve:
    """ToD of one group at every depth, and the depth that was taken.

    Attributes:
        label: of the group.
        tod: [N + 1].
        depth: units removed.
    """

    label: str
    tod: np.ndarray
    depth: int


def kept_bars(
    labels: Sequence[str],
    sizes: Sequence[int],
    kept: Sequence[int],
    null: Sequence[float] | None,
    unit: str,
) -> bytes:
    """Units kept per group, the mean over groups, and where independent rankings would stop.

    Args:
        null: units that the null depth would leave in each group, or None without a tolerance.
    """
    with drawing(WIDTH, 3.2) as (figure, done):
        axes = figure.subplots()
        x = np.arange(len(labels))
        axes.bar(x, sizes, color="#e6eaf0", width=0.8, label="before")
        axes.bar(x, kept, color=BLUE, width=0.8, label="kept")
        mean = float(np.mean(kept))
        axes.axhline(mean, color=ORANGE, lw=1.5, ls="--", label=f"uniform: {mean:.4g} each")
        if null is not None:
            axes.plot(x, null, ls="", marker="_", ms=_fit(400 / len(x), 6, 16), mew=2, color=RED,
                      label="null depth: rankings that know nothing of each other")  # fmt: skip
        if len(x) <= 40:
            for i, n in enumerate(kept):
                axes.text(i, 0, f"{n}\n", ha="center", va="bottom", color="white", linespacing=0.6)
        _ticks(axes, x, labels, 48)
        axes.set(xlabel="layer", ylabel=f"{unit}s", xlim=(-0.7, len(x) - 0.3))
        axes.margins(y=0.02)
        figure.legend(loc="outside upper left", ncols=4)
    return done()


def tod_curves(curves: Sequence[Curve], tolerance: float | None) -> bytes:
    """Each group's ToD over depth: the cut, independent rankings, and what counting forces."""
    columns = min(6, len(curves))
    rows = -(-len(curves) // columns)
    sizes = [len(c.tod) - 1 for c in curves]
    depths = [np.arange(1, n + 1) for n in sizes]
    with drawing(WIDTH, 0.7 + 1.45 * rows) as (figure, done):
        panels = Panels(
            figure.subplots(), len(curves), columns, (0, max(sizes)), (0, 1.05), (0.14, 0.32)
        )
        panels.lines([([0, n], [0, 1]) for n in sizes], "independent rankings",
                     colors=GREY, linewidths=1, linestyles="--")  # fmt: skip
        forced = [(m, np.maximum(0, (2 * m - len(m)) / m)) for m in depths]
        panels.lines(forced, "forced by counting", colors=GREY, linewidths=1, linestyles=":")
        panels.lines([(np.arange(n + 1), c.tod) for n, c in zip(sizes, curves, strict=True)],
                     "ToD", colors=BLUE, linewidths=1.4)  # fmt: skip
        if tolerance is not None:
            level = [([0, max(sizes)], [tolerance, tolerance]) for _ in curves]
            panels.lines(level, f"tolerance {tolerance:.3g}", colors=ORANGE, linewidths=1)
        cuts = [([c.depth, c.depth], [0, 1.05]) for c in curves]
        panels.lines(cuts, "cut", colors=RED, linewidths=1.4)
        panels.titles([f"{printable(c.label)}: {c.depth} removed" for c in curves])
        panels.ticks(_round_numbers(0, max(sizes)), [(v, f"{v:g}") for v in (0, 0.5, 1)])
        figure.legend(loc="outside upper left", ncols=5)
        figure.supxlabel("units removed", fontsize=9)
        figure.supylabel("ToD", fontsize=9)
    return done()


def score_ranks(groups: Sequence[Marked], line: float | None, unit: str) -> bytes:
    """Each group's scores in rising order, what left in red.

    Args:
        line: a score that holds for all groups, or None.
    """
    columns = min(6, len(groups))
    rows = -(-len(groups) // columns)
    most = max(len(g.values) for g in groups)
    every = np.concatenate([g.values for g in groups])
    if line is not None:
        every = np.append(every, line)
    scale, ylim, yticks = _score_scale(every)
    with drawing(WIDTH, 0.8 + 1.6 * rows) as (figure, done):
        panels = Panels(figure.subplots(), len(groups), columns, (0, most + 1), ylim, (0.14, 0.28))
        orders = [np.argsort(g.values, kind="stable") for g in groups]
        gone = [np.isin(o, list(g.removed)) for o, g in zip(orders, groups, strict=True)]
        size = _fit(240 / most, 1, 4)
        for which, color, name in ((False, BLUE, "kept"), (True, RED, "removed")):
            chosen = [np.flatnonzero(g == which) for g in gone]
            xy = [(at + 1, scale(g.values[o[at]]))
                  for at, o, g in zip(chosen, orders, groups, strict=True)]  # fmt: skip
            panels.axes.plot(*panels.points(xy), ls="", marker="o", ms=size, color=color,
                             label=name, clip_on=False)  # fmt: skip
        if line is not None:
            level = np.full(2, float(scale(np.array(line))))
            panels.lines([([0, most + 1], level) for _ in groups], "highest score that left",
                         colors=ORANGE, linewidths=1)  # fmt: skip
        panels.titles([f"layer {printable(g.label)}: {len(g.removed)} removed" for g in groups])
        panels.ticks(_round_numbers(0, most), yticks)
        figure.legend(loc="outside upper left", ncols=3)
        figure.supxlabel(f"{unit}s, in the order of their score", fontsize=9)
        figure.supylabel("score", fontsize=9)
    return done()


def score_map(groups: Sequence[Marked], unit: str) -> bytes:
    """Scores of all units, each group from its lowest (0) to its highest (1), removed ones marked.

    The colour follows the square root: the low end, where the decision falls, is told apart.
    """
    values = np.full((len(groups), max(len(g.values) for g in groups)), np.nan)
    for row, g in zip(values, groups, strict=True):
        span = g.values.max() - g.values.min()
        row[: len(g.values)] = np.sqrt((g.values - g.values.min()) / span) if span else 0.5
    with drawing(WIDTH, 1.0 + _row_height(groups) * len(groups)) as (figure, done):
        axes = figure.subplots()
        image = axes.imshow(
            values, cmap="PuBu", vmin=0, vmax=1, aspect="auto", interpolation="none"
        )
        x = [unit for g in groups for unit in g.removed]
        y = [row for row, g in enumerate(groups) for _ in g.removed]
        _mark(axes, x, y, values.shape[1], RED, "x")
        _map_axes(axes, groups, unit)
        bar = figure.colorbar(image, ax=axes, pad=0.01, fraction=0.02, ticks=[0, 0.5, 1])
        bar.ax.set_yticklabels(["lowest", "¼ of range", "highest"])
    return done()


def routing_maps(domains: Sequence[tuple[str, Sequence[Marked]]], unit: str) -> bytes:
    """Per domain, how often each unit is used against even use, on a log scale.

    Args:
        domains: name, and per group the use of each unit divided by the group's mean use.
    """
    columns = 1 if len(domains) == 1 else 2
    rows = -(-len(domains) // columns)
    _, groups = domains[0]
    height = 0.55 + _row_height(groups, 0.16) * len(groups)
    size = max(len(g.values) for g in groups)
    with drawing(WIDTH, 0.6 + height * rows) as (figure, done):
        panels = Panels(
            figure.subplots(), len(domains), columns, (-0.5, size - 0.5),
            (len(groups) - 0.5, -0.5), (0.03, 0.35 / (height - 0.35)), framed=False,
        )  # fmt: skip
        norm = TwoSlopeNorm(0.0, -FOLD, FOLD)
        for i, (_, marked) in enumerate(domains):
            values = np.full((len(groups), size), np.nan)
            for row, g in zip(values, marked, strict=True):
                row[: len(g.values)] = np.log2(np.maximum(g.values, 2.0**-FOLD))
            (left, right), (low, high) = panels.at(i, panels.xlim, panels.ylim)
            image = panels.axes.imshow(
                values, cmap="PuOr_r", norm=norm, aspect="auto", interpolation="none",
                extent=(left, right, low, high),
            )  # fmt: skip
        xy = [([u for g in marked for u in g.removed],
               [row for row, g in enumerate(marked) for _ in g.removed])
              for _, marked in domains]  # fmt: skip
        _mark(panels.axes, *panels.points(xy), size * columns, "white", "o")
        panels.titles([printable(name) for name, _ in domains], align="left")
        step = -(-len(groups) // 24)
        layers = [(i, printable(g.label)) for i, g in enumerate(groups)][::step]
        panels.ticks(_round_numbers(0, size - 1), layers, unit, "layer")
        bar = figure.colorbar(
            image, ax=panels.axes, pad=0.01, fraction=0.02, ticks=[-FOLD, 0, FOLD]
        )
        most = f"{2**FOLD:.0f}"
        bar.ax.set_yticklabels([f"1/{most} or less", "even use", f"{most} times"])
    return done()


def _score_scale(
    values: np.ndarray,
) -> tuple[Callable[[np.ndarray], np.ndarray], tuple[float, float], Ticks]:
    """Where scores lie, between which limits, and the ticks.

    Scores that are never below zero have a logarithmic scale that begins there, with at most four
    powers of ten on it; others have a plain one.
    """
    positive = values[values > 0]
    if not len(positive) or values.min() < 0:
        low, high = float(values.min()), float(values.max())
        room = 0.05 * (high - low) or 1.0
        return lambda x: x, (low - room, high + room), _round_numbers(low, high)
    least, most = np.log10(np.quantile(positive, 0.1)), np.log10(positive.max())
    scale = SymmetricalLogTransform(10, 10.0**least, 1).transform
    powers = np.arange(np.ceil(least), np.floor(most) + 1)
    powers = powers[:: -(-len(powers) // 4) or 1]
    top = float(scale(np.array(10.0 ** (most + 0.1 * (most - least)))))
    if len(powers) < 2:
        ticks = [(float(scale(np.array(v))), text) for v, text in _round_numbers(0, 10.0**most)]
    else:
        ticks = [(0.0, "0"), *((float(scale(np.array(10.0**p))), f"1e{p:.0f}") for p in powers)]
    return scale, (0, top), ticks


def _round_numbers(low: float, high: float) -> Ticks:
    """Ticks at round numbers from one to the other."""
    places = MaxNLocator(3, steps=[1, 2, 5, 10]).tick_values(low, high)
    return [(float(v), f"{v:g}") for v in places if low <= v <= high]


def _mark(axes: Axes, x: Any, y: Any, cells: float, color: str, marker: str) -> None:
    """Marks at `x` and `y` [N], in cells of which so many lie side by side over the whole width."""
    cell = 640 / cells  # points
    if marker == "x":
        size = _fit(cell * 0.55, 0.8, 5)
        axes.scatter(x, y, s=size**2, c=color, marker="x", linewidths=0.9)
    else:  # a ring, to be seen on every colour
        size = _fit(cell * 0.2, 0.5, 2.5)
        axes.scatter(x, y, s=size**2, c=color, edgecolors="black", linewidths=size / 6)


def _map_axes(axes: Axes, groups: Sequence[Marked], unit: str) -> None:
    _ticks(axes, np.arange(len(groups)), [g.label for g in groups], 24, axis="y")
    axes.set(xlabel=unit, ylabel="layer")
    axes.tick_params(length=2)
    for side in axes.spines.values():
        side.set_visible(False)


def _ticks(axes: Axes, at: np.ndarray, labels: Sequence[str], most: int, axis: str = "x") -> None:
    step = -(-len(labels) // most)
    set_ticks: Callable = axes.set_xticks if axis == "x" else axes.set_yticks
    set_ticks(at[::step], list(map(printable, labels))[::step])


def _row_height(groups: Sequence[Marked], most: float = 0.3) -> float:
    return _fit(6.0 / len(groups), 0.09, most)


def _fit(value: float, least: float, most: float) -> float:
    return min(max(value, least), most)


@contextmanager
def drawing(width: float, height: float) -> Iterator[tuple[Figure, Callable[[], bytes]]]:
    """A figure to draw on, and the function that gives its bytes afterwards.

    Names are drawn `printable`: a half of a character is none that can be drawn.
    """
    out = io.BytesIO()
    with matplotlib.rc_context(STYLE), warnings.catch_warnings():
        # a name in a script that the font lacks is drawn as boxes; the text beside has it right
        warnings.filterwarnings("ignore", message="Glyph .* missing from font")
        figure = Figure(figsize=(width, height), dpi=DPI, layout="constrained")
        yield figure, out.getvalue
        canvas = FigureCanvasAgg(figure)
        canvas.draw()
        # without an alpha channel, for all is opaque; packed less hard, which is no larger
        picture = Image.fromarray(np.asarray(canvas.buffer_rgba())[..., :3])
        picture.save(out, "png", dpi=(DPI, DPI), compress_level=4)
