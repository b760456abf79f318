"""The sections of a report on routing and interference.

Shapes: L layers, T tasks, E factors in a pool.
"""

from __future__ import annotations

from collections.abc import Sequence
from html import escape

import torch
from matplotlib.figure import Figure
from torch import Tensor

from qmixlora.webpage import folded, table

from ..charts import Curve, chart, draw_curves, number
from ..contents import Interference
from ..figures import DIVERGING, SEQUENTIAL, heat_map, short_name
from ..readings import Reading, read_interference, read_routing_figures
from ..routing import RoutingSummary

TASKS, LAYERS = 16, 8  # that are drawn


def told(reading: Reading) -> str:
    """A reading as a paragraph."""
    text = reading.text[0].upper() + reading.text[1:]
    return f'<p class="{reading.verdict}"><b>{reading.verdict}</b>: {escape(text)}</p>'


def routing_section(summary: RoutingSummary) -> str:
    """How the tasks use the factors, with what to make of it."""
    readings = "".join(map(told, read_routing_figures(summary)))
    tasks = range(0, len(summary.tasks), -(-len(summary.tasks) // TASKS))
    shown = summary.of_tasks(list(tasks))
    more = f"<p>{len(shown.tasks)} of {len(summary.tasks)} tasks are drawn.</p>" if shown is not summary else ""
    drift = list(zip(summary.steps[1:], summary.drift().tolist(), strict=True))
    charts = [
        _similarity(shown),
        _entropy(shown),
        draw_curves("How far factor usage moved since the snapshot before", [Curve("moved", drift)], "share moved"),
        *_usage(shown),
    ]
    return f'<h2>Routing</h2>{readings}{more}<div class="grid charts">{"".join(charts)}</div>{_dead(summary)}'


def _similarity(summary: RoutingSummary) -> str:
    tasks, values_TT = summary.tasks, summary.similarity()
    title = "Similarity of the tasks' mean updates (cosine of C_t)"
    return _map(title, values_TT, tasks, tasks, (0, 1), SEQUENTIAL)


def _entropy(summary: RoutingSummary) -> str:
    title = "Entropy of factor usage by layer (1: all alike)"
    layers = [short_name(layer) for layer in summary.layers]
    numbers = table(["layer", *summary.tasks], _rows(layers, summary.entropy()), tall=True)

    def draw(figure: Figure) -> None:
        axes = figure.subplots()
        heat_map(axes, summary.entropy().T, summary.tasks, None, (0, 1), SEQUENTIAL)
        axes.set(xlabel="layers, first to last")

    return chart(title, draw, (5, 1 + 0.16 * len(summary.tasks)), numbers)


def _usage(summary: RoutingSummary) -> list[str]:
    """A chart per layer, for layers throughout the model."""
    layers = range(0, len(summary.layers), -(-len(summary.layers) // LAYERS))
    factors = [str(factor) for factor in range(summary.usage_A_LNTE.shape[3])]
    top = float(summary.usage_A_LNTE[:, -1].max())
    titles = {
        layer: f"Share of gates by factor of pool A, layer {short_name(summary.layers[layer])}" for layer in layers
    }
    return [
        _map(titles[layer], summary.usage_A_LNTE[layer, -1], summary.tasks, factors, (0, top), SEQUENTIAL, cells=False)
        for layer in layers
    ]


def _dead(summary: RoutingSummary) -> str:
    dead_PL = summary.dead().sum(dim=2)
    names = [short_name(layer) for layer in summary.layers]
    rows = [[name, *map(str, pools)] for name, pools in zip(names, dead_PL.T.tolist(), strict=True)]
    return folded("Dead factors by layer", table(["layer", "pool A", "pool B"], rows, tall=True))


def interference_section(measured: Interference) -> str:
    """The means of `interference.json`, and the worst conflict in a sentence."""
    tasks, charts = measured.tasks, []
    for pool, rows in measured.mean.items():
        values_TT = torch.tensor([[float("nan") if value is None else value for value in row] for row in rows])
        title = f"Interference in the factors {pool}: what a step for the column's task does for the row's"
        charts.append(_map(title, values_TT, tasks, tasks, (-1, 1), DIVERGING))
    reading = read_interference(tasks, measured.mean)
    return f'<h2>Interference</h2>{told(reading)}<div class="grid charts">{"".join(charts)}</div>'


def _map(
    title: str,
    values: Tensor,
    rows: Sequence[str],
    columns: Sequence[str],
    limits: tuple[float, float],
    colors: str,
    cells: bool = True,
) -> str:
    def draw(figure: Figure) -> None:
        heat_map(figure.subplots(), values, rows, columns, limits, colors, numbers=cells and len(rows) <= TASKS)

    numbers = table(["", *columns], _rows(rows, values), tall=True)
    return chart(title, draw, (5, 1.5 + 0.2 * len(rows)), numbers)


def _rows(names: Sequence[str], values: Tensor) -> list[list[str]]:
    return [[name, *map(number, row)] for name, row in zip(names, values.tolist(), strict=True)]
