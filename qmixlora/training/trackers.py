"""Experiment trackers: transformers' own integrations, with pictures of answers beside the numbers."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure
from transformers import Trainer, TrainerCallback
from transformers.integrations.integration_utils import TensorBoardCallback

from qmixlora.data import Conversation, open_images
from qmixlora.errors import UserError
from qmixlora.evaluation import Scores

PROJECT, ANSWERS = "qmixlora", "answers"
SHOWN, COLUMNS = 8, 4  # pictures of answers


def check_installed(report_to: Sequence[str]) -> None:
    """Raise UserError for a tracker whose package, which is named as it is, is not there."""
    missing = [name for name in report_to if importlib.util.find_spec(name) is None]
    if missing:
        raise UserError(
            f"The package of {missing[0]} is not installed.",
            where=f"train.report_to: {missing[0]}",
            fix=f"pip install {' '.join(missing)} (the extra `trackers` names all of them).",
        )


def by_transformers(report_to: Sequence[str]) -> list[str]:
    """The trackers that Trainer starts by itself."""
    return [name for name in report_to if name != "tensorboard"] or ["none"]


def own_callbacks(report_to: Sequence[str], folder: Path) -> list[TrainerCallback]:
    """The others: TensorBoard, whose files lie in the run's folder."""
    if "tensorboard" not in report_to:
        return []
    from torch.utils.tensorboard import SummaryWriter

    return [TensorBoardCallback(SummaryWriter(str(folder / "tensorboard")))]


def show_answers(trainer: Trainer, report_to: Sequence[str], rows: Sequence[Conversation], scores: Scores) -> None:
    """Hand a figure of answers to every tracker of a run that has begun."""
    figure = draw_answers(rows, scores)
    for name in report_to:
        SENDERS[name](figure, trainer.state.global_step, trainer.callback_handler.callbacks)


def draw_answers(rows: Sequence[Conversation], scores: Scores) -> Figure:
    """The first answers, each below its image, with what was expected where it is another."""
    shown = scores.predictions[:SHOWN]
    lines = -(-len(shown) // COLUMNS)
    figure = Figure(figsize=(3 * COLUMNS, 3.4 * lines), layout="constrained")
    for axes, one in zip(figure.subplots(lines, COLUMNS, squeeze=False).flat, shown, strict=False):
        if images := rows[one.row]["images"]:
            axes.imshow(open_images(images[:1])[0])
        said = one.answer.strip() or "nothing"
        expected = f" (not {one.references[0]})" if one.score < 1 else ""
        axes.set_title(f"{one.task}: {one.question}\n{said}{expected}"[:160], fontsize=8, wrap=True, parse_math=False)
    for axes in figure.axes:
        axes.set_axis_off()
    return figure


def _to_tensorboard(figure: Figure, step: int, callbacks: Sequence[TrainerCallback]) -> None:
    for callback in callbacks:
        if isinstance(callback, TensorBoardCallback) and callback.tb_writer is not None:
            callback.tb_writer.add_figure(ANSWERS, figure, step)


def _to_wandb(figure: Figure, step: int, callbacks: Sequence[TrainerCallback]) -> None:
    import wandb

    wandb.log({ANSWERS: wandb.Image(figure), "train/global_step": step})


def _to_trackio(figure: Figure, step: int, callbacks: Sequence[TrainerCallback]) -> None:
    import trackio

    trackio.log({ANSWERS: trackio.Image(_pixels(figure)), "train/global_step": step})


def _to_mlflow(figure: Figure, step: int, callbacks: Sequence[TrainerCallback]) -> None:
    import mlflow

    mlflow.log_figure(figure, f"{ANSWERS}-{step}.png")


def _pixels(figure: Figure) -> Any:
    import numpy as np
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    return np.asarray(canvas.buffer_rgba())[..., :3].copy()


SENDERS: Mapping[str, Callable[[Figure, int, Sequence[TrainerCallback]], None]] = {
    "tensorboard": _to_tensorboard,
    "wandb": _to_wandb,
    "trackio": _to_trackio,
    "mlflow": _to_mlflow,
}
