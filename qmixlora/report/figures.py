"""Figures as PNG files, drawn without a display.

Shapes: T tasks, E factors, L layers.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from torch import Tensor

from .routing import RoutingSummary

DIVERGING, SEQUENTIAL = "RdBu", "viridis"
COLUMNS, DRAWN = 4, 28  # of the layers whose usage is drawn; so many at most
LONGEST = 24  # characters of a label
AS_TYPED: Any = {"text.parse_math": False}  # names of tasks and runs are no formulas, whatever dollars they have


@rc_context(AS_TYPED)
def draw_interference(tasks: Sequence[str], matrices: dict[str, Tensor], path: Path) -> Path:
    """Heat maps of task interference (T x T) by their titles: blue helps, red harms; cut at -1 and 1."""
    size = 2 + 0.45 * len(tasks)
    figure = Figure(figsize=(size * len(matrices), size), layout="constrained")
    for axes, (title, matrix_TT) in zip(
        figure.subplots(1, len(matrices), squeeze=False)[0], matrices.items(), strict=True
    ):
        heat_map(axes, matrix_TT, tasks, tasks, (-1, 1), DIVERGING, numbers=len(tasks) <= 16)
        axes.set(title=title, xlabel="a step for this task ...", ylabel="... changes this task")
    return _save(figure, path)


@rc_context(AS_TYPED)
def draw_routing(summary: RoutingSummary, folder: Path) -> list[Path]:
    """`routing-usage.png` (factors per task, for layers throughout the model), `routing-tasks.png` (task similarity and
    entropy per layer) and `routing-drift.png`.
    """
    return [
        _save(_usage(summary), folder / "routing-usage.png"),
        _save(_tasks(summary), folder / "routing-tasks.png"),
        _save(_drift(summary), folder / "routing-drift.png"),
    ]


def _usage(summary: RoutingSummary) -> Figure:
    layers = range(0, len(summary.layers), -(-len(summary.layers) // DRAWN))
    rows = -(-len(layers) // COLUMNS)
    height = 0.7 + 0.16 * len(summary.tasks)
    figure = Figure(figsize=(3.4 * COLUMNS, height * rows + 0.6), layout="constrained")
    grid = figure.subplots(rows, COLUMNS, squeeze=False)
    top = float(summary.usage_A_LNTE[:, -1].max())
    for axes in grid.flat[len(layers) :]:
        axes.set_axis_off()
    for position, index in enumerate(layers):
        axes = grid.flat[position]
        first = position % COLUMNS == 0
        tasks = summary.tasks if first else [""] * len(summary.tasks)
        heat_map(axes, summary.usage_A_LNTE[index, -1], tasks, None, (0, top), SEQUENTIAL)
        axes.set_title(short_name(summary.layers[index]), fontsize=8)
    figure.suptitle(
        "Share of a task's gates that each factor of pool A gets (rows: tasks, columns: factors)", fontsize=10
    )
    return figure


def _tasks(summary: RoutingSummary) -> Figure:
    size = 2 + 0.35 * len(summary.tasks)
    figure = Figure(figsize=(2 * size + 1, size + 0.5), layout="constrained")
    left, right = figure.subplots(1, 2)
    heat_map(
        left, summary.similarity(), summary.tasks, summary.tasks, (0, 1), SEQUENTIAL, numbers=len(summary.tasks) <= 16
    )
    left.set_title("Similarity of the tasks' mean updates (cosine of C_t)")
    heat_map(right, summary.entropy().T, summary.tasks, None, (0, 1), SEQUENTIAL)
    right.set(title="Entropy of factor usage (1: all alike)", xlabel="layers, first to last")
    return figure


def _drift(summary: RoutingSummary) -> Figure:
    figure = Figure(figsize=(6, 3), layout="constrained")
    axes = figure.subplots()
    axes.plot(summary.steps[1:], summary.drift().tolist(), marker="o")
    axes.set(title="How far factor usage moved since the snapshot before", xlabel="step", ylabel="share moved")
    axes.set_ylim(bottom=0)
    return figure


def heat_map(
    axes: Axes,
    values: Tensor,
    rows: Sequence[str],
    columns: Sequence[str] | None,
    limits: tuple[float, float],
    colors: str,
    numbers: bool = False,
) -> None:
    """Draw values (rows x columns) into axes, with names of rows and, if given, of columns."""
    axes.imshow(values.numpy(), vmin=limits[0], vmax=limits[1], cmap=colors, aspect="auto")
    axes.set_yticks(range(len(rows)), map(shortened, rows), fontsize=7)
    if columns is None:
        axes.set_xticks([])
    else:
        axes.set_xticks(range(len(columns)), map(shortened, columns), rotation=60, ha="right", fontsize=7)
    if numbers:
        middle = sum(limits) / 2
        for row, line in enumerate(values.tolist()):
            for column, value in enumerate(line):
                strong = abs(value - middle) > 0.6 * (limits[1] - middle)
                dark = strong if colors == DIVERGING else value < middle
                axes.text(
                    column,
                    row,
                    f"{round(value, 1) + 0.0:.1f}",
                    ha="center",
                    va="center",
                    fontsize=6,
                    color="w" if dark else "k",
                )


def shortened(label: str) -> str:
    """A label that leaves room for what it names."""
    label = drawable(label)
    return label if len(label) <= LONGEST else f"{label[: LONGEST - 3]}..."


def drawable(label: str) -> str:
    """A label with `?` for what is no text (half a surrogate pair), which no font takes."""
    return label.encode(errors="replace").decode()


def short_name(layer: str) -> str:
    """`model.language_model.layers.3.self_attn.q_proj` -> `3 self_attn.q_proj`."""
    return layer.rpartition("layers.")[2].replace(".", " ", 1)


def _save(figure: Figure, path: Path) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=130)
    return path
