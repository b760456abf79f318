"""The section of a report on training: loss, learning rate, gradient norm, speed and memory over steps."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from ..charts import Curve, draw_curves
from ..record import RunRecord

Points = Sequence[tuple[int, float]]


def learning_section(records: Sequence[RunRecord]) -> str:
    """The curves of all runs, in one chart each."""
    marks = _memory_marks(records[0]) if len(records) == 1 else {}
    speeds = _all(records, lambda one: list(one.speeds()), smoothed=True)
    charts = [
        draw_curves("Training loss, smoothed", _curves(records, "loss", smoothed=True), "loss"),
        draw_curves("Validation loss", _curves(records, "eval_loss"), "loss"),
        draw_curves("Score on validation, by generation", _curves(records, "eval_score"), "score"),
        draw_curves("Learning rate", _curves(records, "learning_rate"), "learning rate"),
        draw_curves("Gradient norm before clipping, smoothed", _curves(records, "grad_norm", smoothed=True), "norm"),
        draw_curves("Samples per second, smoothed", speeds, "samples/s", from_zero=True),
        draw_curves("Memory, the highest so far", _curves(records, "memory_gib"), "GiB", marks, from_zero=True),
    ]
    drawn = "".join(charts)
    return f'<h2>Training</h2><div class="grid charts">{drawn}</div>' if drawn else ""


def _memory_marks(record: RunRecord) -> dict[str, float]:
    """The card and the plan of a run on a GPU; without one it is the process's memory, which nobody planned."""
    sizes = {} if record.plan is None else {"card": record.plan.card_gib, "plan": record.plan.peak_gib}
    return {label: size for label, size in sizes.items() if size is not None}


def _curves(records: Sequence[RunRecord], key: str, smoothed: bool = False) -> list[Curve]:
    return _all(records, lambda one: [(log["step"], log[key]) for log in one.logged(key)], smoothed)


def _all(records: Sequence[RunRecord], points: Callable[[RunRecord], Points], smoothed: bool) -> list[Curve]:
    return [Curve(record.name, points(record), smoothed) for record in records]
