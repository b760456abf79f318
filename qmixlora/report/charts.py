"""Charts as SVG in a page's own colours, drawn by matplotlib without a display."""

from __future__ import annotations

import io
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from html import escape
from itertools import cycle
from typing import Any

import matplotlib
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import MaxNLocator

from qmixlora.webpage import COLORS, folded, table

from .figures import AS_TYPED, drawable, shortened

# Colours that stand for the page's own, which it gives in light and dark; matplotlib knows no CSS.
INK, LINE, PAPER = "#010101", "#020202", "#030303"
SERIES = [f"#0400{number:02x}" for number in range(len(COLORS))]
VARIABLES = {INK: "--ink", LINE: "--line", PAPER: "--paper"} | {
    color: f"--c{number}" for number, color in enumerate(SERIES)
}
DASHES = ("-", "--", "-.", ":", (0, (5, 1)), (0, (1, 1)))  # lines are told apart without colours too
POINTS, ROWS = 300, 60  # of a curve: in its chart, and in its table
WINDOW = 10  # logs that smoothing reaches over, or a tenth of them where there are fewer
LOOK: Any = AS_TYPED | {
    "svg.fonttype": "none",
    "svg.hashsalt": "qmixlora",
    "font.family": "sans-serif",
    "font.size": 9,
    "axes.titlesize": 9,
    "text.color": INK,
    "axes.labelcolor": INK,
    "xtick.color": INK,
    "ytick.color": INK,
    "axes.edgecolor": LINE,
    "grid.color": LINE,
    "grid.linewidth": 0.5,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "legend.frameon": False,
}


@dataclass(frozen=True)
class Curve:
    """Values by step; `smoothed` ones have their raw values behind them."""

    label: str
    points: Sequence[tuple[int, float]]
    smoothed: bool = False


def smooth(values: Sequence[float]) -> list[float]:
    """The exponential moving average over `WINDOW` values, corrected for its beginning (as in Adam and TensorBoard)."""
    weight = 1 - 1 / max(1.0, min(WINDOW, len(values) / WINDOW))
    mean, smoothed = 0.0, []
    for count, value in enumerate(values, 1):
        mean = weight * mean + (1 - weight) * value
        smoothed.append(mean / (1 - weight**count))
    return smoothed


def draw_curves(
    title: str, curves: Sequence[Curve], unit: str, marks: Mapping[str, float] | None = None, *, from_zero: bool = False
) -> str:
    """A chart of curves over steps, with horizontal marks, and a table of its numbers; empty without a point.

    `from_zero` shows amounts whole, so that a change is seen beside what it is a change of.
    """
    named = len(curves) > 1  # which of them has points is to be told too
    curves = [curve for curve in curves if curve.points]
    if not curves:
        return ""

    def draw(figure: Figure) -> None:
        axes = figure.subplots()
        looks, lines = zip(curves, cycle(SERIES), cycle(DASHES), strict=False), list[Line2D]()
        for curve, color, dash in looks:
            steps, values = zip(*_thinned(curve.points, POINTS), strict=True)
            if curve.smoothed:
                axes.plot(steps, values, color=color, alpha=0.3, linewidth=0.8)
                smoothed = _thinned(_smoothed(curve.points), POINTS)
                steps, values = zip(*smoothed, strict=True)
            dot = "o" if len({*steps}) == 1 else ""  # a line of one step is not seen
            lines += axes.plot(steps, values, color=color, linestyle=dash, label=drawable(curve.label), marker=dot)
        for number, (label, value) in enumerate((marks or {}).items()):
            look: Any = {"color": INK, "linestyle": DASHES[1 + number % 3], "linewidth": 1}
            lines.append(axes.axhline(value, label=f"{label} {value:.2f}", **look))
        axes.set(xlabel="step", ylabel=unit)
        axes.grid(axis="y")
        axes.set_xlim(left=0)
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        axes.set_ylim(bottom=0 if from_zero else None)
        if named or marks:
            axes.legend(handles=lines, fontsize=8)  # named: else it leaves out those that begin with _

    return chart(title, draw, (5.0, 2.7), _curve_table(curves))


def _curve_table(curves: Sequence[Curve]) -> str:
    columns = [(curve.label, dict(curve.points)) for curve in curves]
    columns += [(f"{curve.label}, smoothed", dict(_smoothed(curve.points))) for curve in curves if curve.smoothed]
    steps = sorted({step for _, points in columns for step in points})
    every = -(-len(steps) // ROWS)
    shown = sorted({*steps[::every], steps[-1]})
    rows = [[str(step), *(number(points.get(step)) for _, points in columns)] for step in shown]
    return table(["step", *(label for label, _ in columns)], rows, tall=True)


def _smoothed(points: Sequence[tuple[int, float]]) -> list[tuple[int, float]]:
    return list(zip((step for step, _ in points), smooth([value for _, value in points]), strict=True))


def _thinned(points: Sequence[tuple[int, float]], most: int) -> list[tuple[int, float]]:
    every = -(-len(points) // most)
    return [*points[:-1:every], points[-1]]


def draw_scores(title: str, tasks: Sequence[str], series: Mapping[str, Sequence[Score | None]], numbers: str) -> str:
    """A chart of scores (value, interval) by task: a dot with its interval for each series."""

    def draw(figure: Figure) -> None:
        axes = figure.subplots()
        markers, dots = cycle("osD^vP"), list[Line2D]()
        for place, (label, scores) in enumerate(series.items()):
            color, marker = SERIES[place % len(SERIES)], next(markers)
            offset = (place + 1) / (len(series) + 1) - 0.5  # the first on top
            for row, score in enumerate(scores):
                if score is not None and score.interval is not None:
                    axes.plot(score.interval, [row + offset] * 2, color=color, linewidth=1.5)
            there = [(score.value, row + offset) for row, score in enumerate(scores) if score is not None]
            if there:
                look: Any = {"color": color, "markersize": 5, "label": drawable(label)}
                dots += axes.plot(*zip(*there, strict=True), marker, **look)
        axes.set_yticks(range(len(tasks)), [shortened(task) for task in tasks], fontsize=8)
        axes.set_ylim(len(tasks) - 0.5, -0.5)
        axes.set_xlim(left=min(0, axes.get_xlim()[0]))
        axes.set(xlabel="score")
        axes.grid(axis="x")
        if len(series) > 1:
            axes.legend(handles=dots, fontsize=8, loc="lower center", bbox_to_anchor=(0.5, 1), ncols=2)

    return chart(title, draw, (5.0, 1.1 + 0.12 * len(tasks) * (1 + len(series))), numbers)


@dataclass(frozen=True)
class Score:
    """A mean score with its 95 % interval."""

    value: float
    interval: tuple[float, float] | None


def chart(title: str, draw: Callable[[Figure], None], size: tuple[float, float], numbers: str) -> str:
    """A chart of a page: drawn as SVG, with a table of its numbers that folds."""
    with drawing():
        figure = Figure(figsize=size, layout="constrained")
        draw(figure)
        svg = svg_of(figure, title)
    return f'<div class="chart"><h3>{escape(title)}</h3>{svg}{folded("Numbers", numbers)}</div>'


@contextmanager
def drawing() -> Iterator[None]:
    """Figures that are made and saved in this block have the page's colours."""
    with matplotlib.rc_context(LOOK):
        yield


def svg_of(figure: Figure, label: str) -> str:
    """A figure as an SVG element in the page's colours and fonts, as wide as its place."""
    file = io.StringIO()
    figure.savefig(file, format="svg", transparent=True, metadata={"Date": None, "Creator": None})
    text = file.getvalue()
    svg = text[text.index("<svg") :]
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg, flags=re.DOTALL)
    svg = re.sub(r' (width|height)="[\d.]+pt"', "", svg, count=2)
    svg = re.sub(r' id="[a-zA-Z_]+(\.[a-z_]+)?_\d+"', "", svg)  # names of groups, the same in every figure
    svg = re.sub(r"\s*\n\s*", " ", svg)
    for color, variable in VARIABLES.items():
        svg = svg.replace(color, f"var({variable})")
    return svg.replace("<svg", f'<svg role="img" aria-label="{escape(label)}"', 1)


def number(value: float | None) -> str:
    """A number with four digits that count, or nothing."""
    return "" if value is None else f"{value:.4g}"
