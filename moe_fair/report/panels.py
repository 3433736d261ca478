"""Small multiples in one axes: a ToD curve, a ranking or a map for each group.

An axes of its own for each costs matplotlib some 50 ms, most of it ticks that nobody sees: a report
on a model of 60 layers would take ten seconds for them.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.collections import LineCollection
from matplotlib.markers import TICKDOWN, TICKLEFT

Ticks = Sequence[tuple[float, str]]  # in a panel's own numbers, and what is written there
INK = "#222222"
TICK = 3.0  # points


class Panels:
    """Boxes of equal size and scale, row by row from the top left.

    Args:
        axes: what they are drawn in, and nothing else.
        count: of the panels.
        xlim, ylim: what each shows; a limit that is the lower of two lies left, or below.
        gaps: between two columns and above each row, in widths and heights of a panel.
        framed: a line along the left and the lower side of each.
    """

    def __init__(
        self,
        axes: Axes,
        count: int,
        columns: int,
        xlim: tuple[float, float],
        ylim: tuple[float, float],
        gaps: tuple[float, float],
        *,
        framed: bool = True,
    ) -> None:
        self.axes, self.count, self.columns, self.framed = axes, count, columns, framed
        self.xlim, self.ylim, self.gaps = xlim, ylim, gaps
        rows = -(-count // columns)
        axes.set_axis_off()
        axes.set_xlim(0, columns * (1 + gaps[0]) - gaps[0])
        axes.set_ylim(-rows * (1 + gaps[1]), 0)

    def at(self, i: int, x: Any, y: Any) -> tuple[np.ndarray, np.ndarray]:
        """Where points of panel i lie; `x` and `y` [N] or numbers, in its own numbers."""
        row, column = divmod(i, self.columns)
        across = (np.asarray(x, float) - self.xlim[0]) / (self.xlim[1] - self.xlim[0])
        up = (np.asarray(y, float) - self.ylim[0]) / (self.ylim[1] - self.ylim[0])
        return column * (1 + self.gaps[0]) + across, up - (row + 1) * (1 + self.gaps[1])

    def lines(self, xy: Sequence[tuple[Any, Any]], label: str, **style: Any) -> None:
        """A line in every panel.

        Args:
            xy: for each panel the x [N] and y [N] of its points.
        """
        drawn = [np.stack(self.at(i, x, y), -1) for i, (x, y) in enumerate(xy)]
        self.axes.add_collection(LineCollection(drawn, label=label, **style), autolim=False)

    def points(self, xy: Sequence[tuple[Any, Any]]) -> tuple[np.ndarray, np.ndarray]:
        """The points of all panels in a row, to be drawn at once; `xy` as in `lines`."""
        placed = [self.at(i, x, y) for i, (x, y) in enumerate(xy)]
        return np.concatenate([p[0] for p in placed]), np.concatenate([p[1] for p in placed])

    def titles(self, names: Sequence[str], align: str = "center") -> None:
        """A line above each panel."""
        across = self.xlim[0] if align == "left" else sum(self.xlim) / 2
        for i, name in enumerate(names):
            self._write(i, across, self.ylim[1], (0, 3), name, ha=align, va="bottom")

    def ticks(self, x: Ticks, y: Ticks, xlabel: str = "", ylabel: str = "") -> None:
        """Ticks at every panel, numbers below the lowest of each column and left of each row."""
        left, low = self.xlim[0], self.ylim[0]
        for i in range(self.count):
            outer, lowest = i % self.columns == 0, i + self.columns >= self.count
            for at, text in y if outer else ():
                self._write(i, left, at, (-2 - TICK, 0), text, ha="right", va="center")
            for at, text in x if lowest else ():
                self._write(i, at, low, (0, -2 - TICK), text, ha="center", va="top")
            if lowest and xlabel:
                middle = sum(self.xlim) / 2
                self._write(i, middle, low, (0, -15), xlabel, ha="center", va="top")
            if outer and ylabel:
                middle, beside = sum(self.ylim) / 2, 8 + 6 * max((len(t) for _, t in y), default=0)
                self._write(
                    i, left, middle, (-beside, 0), ylabel, ha="right", va="center", rotation=90
                )
        every = range(self.count)
        across, up = [at for at, _ in x], [at for at, _ in y]
        for marker, xy in (
            (TICKLEFT, [self.at(i, np.full(len(up), left), up) for i in every]),
            (TICKDOWN, [self.at(i, across, np.full(len(across), low)) for i in every]),
        ):
            self.axes.plot(*np.concatenate(xy, 1), ls="", marker=marker, ms=TICK, color=INK,
                           mew=0.8, clip_on=False)  # fmt: skip
        if self.framed:
            corner = [([left, left, self.xlim[1]], [self.ylim[1], low, low]) for _ in every]
            self.lines(corner, "_frame", colors=INK, linewidths=0.8, clip_on=False)

    def _write(
        self, i: int, x: float, y: float, away: tuple[float, float], text: str, **how: Any
    ) -> None:
        """Text so many points away from a place in a panel."""
        across, up = self.at(i, x, y)
        self.axes.annotate(
            text, (float(across), float(up)), away, textcoords="offset points",
            annotation_clip=False, **how,
        )  # fmt: skip
