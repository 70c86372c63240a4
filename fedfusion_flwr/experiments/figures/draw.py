# SPDX-License-Identifier: Apache-2.0
"""What figures share: how strategies look, pictures with their numbers, the parts of a page."""

from __future__ import annotations

import io
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import fmean
from typing import Any, Literal, NamedTuple
from urllib.parse import quote

import matplotlib as mpl
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, MaxNLocator, NullFormatter
from pandas import DataFrame

from fedfusion_flwr.experiments.results import CENTRALIZED

WIDTH = 4.2
"""Inches of every picture: its letters can still be read on a telephone's width."""
_LEGEND_ROW = 0.18
_SHORT_NAME = 12
_LOG_STEPS: tuple[tuple[float, tuple[float, ...]], ...] = (
    (50.0, (1,)),
    (5.0, (1, 2, 5)),
    (0.0, (1, 1.5, 2, 3, 4, 5, 7)),
)
"""The multiples of powers of ten that fit on an axis whose ends have at least this ratio."""
_COORDINATES = re.compile(r' (?:d|x|y|transform)="[^"]*"')
_RC: Any = {
    # The same numbers give the same file, and letters stay letters.
    "svg.hashsalt": "fedfusion",
    "svg.fonttype": "none",
    "path.simplify": True,
    "font.size": 9.5,
    "hatch.linewidth": 0.6,
}


class Look(NamedTuple):
    """How one strategy is drawn; each differs from all others also without its colour."""

    color: str
    line: str | tuple[int, tuple[int, ...]]
    marker: str
    hatch: str
    width: float = 1.4

    def curve(self, points: int, marks: int = 8) -> dict[str, Any]:
        """How a line over so many points is drawn, with at most about so many marks."""
        line = {"color": self.color, "linestyle": self.line, "linewidth": self.width}
        return {**line, "marker": self.marker, "markersize": 4,
                "markevery": max(1, points // marks)}  # fmt: skip


# Okabe & Ito's palette for the colour-blind, without its yellow, which fades on white; grey added.
# Vermilion is FedFusion's alone among the strategies.
_COLORS = (
    "#D55E00", "#0072B2", "#009E73", "#CC79A7", "#56B4E9", "#E69F00", "#666666",
)  # fmt: skip
_LINES: tuple[str | tuple[int, tuple[int, ...]], ...] = (
    "-", (0, (5, 2)), (0, (1, 1)), (0, (5, 1, 1, 1)), (0, (8, 2, 2, 2, 2, 2)),
)  # fmt: skip
_MARKERS = ("o", "s", "^", "D", "v", "P", "X", "<", ">", "h", "p", "*", "d", "8")
_CENTRALIZED_LOOK = Look("black", (0, (2, 1)), "|", "", 2.4)
_HATCHES = ("", "///", "...", "xxx", "\\\\\\", "+++", "ooo", "|||", "---", "//..", "\\\\..", "xx..")


_KNOWN = (
    "fedfusion", "fedavg", "fedavgm", "fedprox", "fed-gn", "fedbn", "fedma", "fesem", "ifca",
    "fedcluster", "fedcluster-cycling", "fedgroup",
)  # fmt: skip
"""Look the same in every report; the order is that of their looks."""


def looks(names: Iterable[str]) -> dict[str, Look]:
    """The looks of strategies; names that are not known take the next ones, in their order."""
    names = list(dict.fromkeys(names))
    found = {CENTRALIZED: _CENTRALIZED_LOOK, _KNOWN[0]: numbered_look(0)._replace(width=2.2)}
    others = [name for name in names if name not in (*_KNOWN, CENTRALIZED)]
    for number, name in enumerate((*_KNOWN[1:], *others)):
        # Six colours and four lines: the eleven after FedFusion differ in one of the two.
        color = _COLORS[1 + number % (len(_COLORS) - 1)]
        line = _LINES[1 + number % (len(_LINES) - 1)]
        found[name] = numbered_look(number + 1)._replace(color=color, line=line)
    return {name: found[name] for name in names}


def numbered_look(number: int) -> Look:
    """The look of the number-th of several things."""
    of: Any = (_COLORS, _LINES, _MARKERS, _HATCHES)
    return Look(*(looks[number % len(looks)] for looks in of))


@dataclass(frozen=True)
class Picture:
    """A figure with its numbers and its texts.

    Attributes
    ----------
    name : str
        Of its files, without suffix.
    title, caption, alt : str
        Above it, below it, and for those who cannot see it.
    figure : Figure
        Drawn, not saved.
    numbers : DataFrame
        What is drawn.
    """

    name: str
    title: str
    caption: str
    alt: str
    figure: Figure
    numbers: DataFrame

    def write(self, folder: Path) -> str:
        """Write ``<name>.svg``, ``.png`` and ``.csv``; the SVG as a data URI, for a page."""
        buffer = io.StringIO()
        with mpl.rc_context(_RC):
            self.figure.savefig(buffer, format="svg", metadata={"Date": None})
            # The layout stands.
            self.figure.set_layout_engine("none")
            self.figure.savefig(folder / f"{self.name}.png", dpi=150)
        # Coordinates to a hundredth of a point: half the file, and no visible difference.
        svg = _COORDINATES.sub(lambda at: re.sub(r"(\.\d\d)\d+", r"\1", at[0]), buffer.getvalue())
        (folder / f"{self.name}.svg").write_text(svg, encoding="utf-8")
        self.numbers.to_csv(folder / f"{self.name}.csv", index=False, lineterminator="\n")
        # Not base64: coordinates stay as short as they are.
        return "data:image/svg+xml," + quote(svg, safe=" /:;=,.()-")

    @property
    def size(self) -> tuple[int, int]:
        """Width and height in CSS pixels."""
        width, height = self.figure.get_size_inches()
        return round(width * 96), round(height * 96)


@dataclass(frozen=True)
class Table:
    """Numbers that the page shows as they are: the first column names the row."""

    name: str
    caption: str
    header: list[str]
    rows: list[list[str]]
    numbers: DataFrame

    def write(self, folder: Path) -> None:
        """Write ``<name>.csv``."""
        self.numbers.to_csv(folder / f"{self.name}.csv", index=False, lineterminator="\n")


@dataclass
class Part:
    """What is shown of one setting or run."""

    title: str
    pictures: list[Picture] = field(default_factory=list)
    tables: list[Table] = field(default_factory=list)


@dataclass
class Section:
    """One question of the report: its parts, and what could not be drawn; the page has its text."""

    anchor: str
    parts: list[Part] = field(default_factory=list)
    missing: list[str] = field(default_factory=list)


def canvas(height: float, rows: int = 1, columns: int = 1, **options: Any) -> tuple[Figure, Any]:
    """A figure of the common width, and its axes, (rows, columns)."""
    with mpl.rc_context(_RC):
        figure = Figure(figsize=(WIDTH, height), layout="constrained")
        FigureCanvasAgg(figure)
        axes = figure.subplots(rows, columns, squeeze=False, **options)
    for ax in axes.flat:
        ax.spines[["top", "right"]].set_visible(False)
        ax.grid(alpha=0.25, linewidth=0.6)
        ax.set_axisbelow(True)
    return figure, axes


def legend_above(figure: Figure, ax: Axes) -> None:
    """One legend for all axes of a figure, over them; the figure grows by its rows."""
    handles, labels = ax.get_legend_handles_labels()
    columns = 3 if max(map(len, labels), default=0) <= _SHORT_NAME else 2
    width, height = figure.get_size_inches()
    figure.set_size_inches(width, height + _LEGEND_ROW * math.ceil(len(labels) / columns))
    options: Any = {"frameon": False, "fontsize": "small", "handlelength": 3.2}
    figure.legend(
        handles, labels, loc="outside upper left", ncols=columns, columnspacing=1.2, **options
    )


def lines(
    ax: Axes,
    table: DataFrame,
    by: str,
    x: str,
    y: str,
    styles: Mapping[Any, Look],
    marks: int = 8,
    **options: Any,
) -> None:
    """A line of column y over column x for each value of column ``by``, in the table's order.

    If the table has ``least`` and ``greatest``, of more than one seed, they bound a band.
    """
    for name, of in table.groupby(by, sort=False):
        look: Any = styles[name].curve(len(of), marks) | options
        ax.plot(of[x], of[y], label=name, **look)
        if "seeds" in of and of["seeds"].max() > 1:
            color = styles[name].color
            ax.fill_between(of[x], of["least"], of["greatest"], color=color, alpha=0.13, lw=0)
    if x == "round":
        ax.set_xlabel(x)
        ax.xaxis.set_major_locator(MaxNLocator(integer=True))


def bars(ax: Axes, names: Sequence[str], values: Sequence[Sequence[float]]) -> None:
    """Horizontal bars of the strategies' means, first on top, from the least to the greatest."""
    bar: Any = {"height": 0.7, "alpha": 0.75, "edgecolor": "white", "linewidth": 0}
    for row, (style, numbers) in enumerate(zip(looks(names).values(), values, strict=True)):
        if numbers:
            ax.barh(row, fmean(numbers), color=style.color, hatch=style.hatch, **bar)
            ax.plot([min(numbers), max(numbers)], [row] * 2, color="black", linewidth=1.5)
    name_rows(ax, names)


def dots(
    ax: Axes, row: float, values: Sequence[float], style: Look, *, hollow: bool = False
) -> None:
    """The mean as a mark, and a line from the least to the greatest value; nothing of no values."""
    if not values:
        return
    ax.plot([min(values), max(values)], [row] * 2, color=style.color, linewidth=2)
    shape, face = ("D", "white") if hollow else ("o", style.color)
    ax.plot(fmean(values), row, shape, color=style.color, markerfacecolor=face, markersize=6)


def name_rows(ax: Axes, names: Sequence[str]) -> None:
    """Name the rows of a chart from top to bottom."""
    ax.set_yticks(range(len(names)), names)
    ax.set_ylim(len(names) - 0.4, -0.6)


def plain_log(ax: Axes, which: Literal["x", "y"]) -> None:
    """A logarithmic axis with plain numbers; call it when all is drawn."""
    ax.set(**{f"{which}scale": "log"})
    axis = ax.xaxis if which == "x" else ax.yaxis
    low, high = axis.get_view_interval()
    steps = next(steps for least, steps in _LOG_STEPS if high >= least * low)
    axis.set_major_locator(LogLocator(subs=steps))
    axis.set_major_formatter("{x:g}")
    axis.set_minor_formatter(NullFormatter())


def in_words(pairs: Iterable[tuple[str, float]], digits: int = 3) -> str:
    """``a 0.912, b 0.850``: values by name, for captions and alternative texts."""
    return ", ".join(f"{name} {value:.{digits}f}" for name, value in pairs)
