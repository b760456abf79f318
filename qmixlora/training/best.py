"""Which checkpoint a run keeps: the one that answers best on a sample of validation, or has the lowest loss there."""

from __future__ import annotations

import random
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from datasets import Dataset
from transformers.trainer_callback import TrainerState

from qmixlora.adapter import load_adapter, read_weights
from qmixlora.data import Conversation, indices_by_task
from qmixlora.evaluation import Scores, evaluate, score
from qmixlora.files import replacing
from qmixlora.mixlora.routing_record import FILE
from qmixlora.recipe import Recipe
from qmixlora.session import TunedSession

from .checkpoints import PREFIX

SCORE, LOSS, CUT = "eval_score", "eval_loss", "eval_cut"  # of an evaluation, as Trainer and trackers name them


def judged_by(recipe: Recipe) -> str | None:
    """What decides which checkpoint is the best; None for a run that keeps its last step."""
    spec = recipe.train
    return SCORE if spec.eval_generate else LOSS if spec.early_stopping else None


@dataclass(frozen=True)
class Examination:
    """A sample of validation whose answers are generated and scored at every evaluation."""

    session: TunedSession
    rows: Dataset
    show: Callable[[Sequence[Conversation], Scores], None] = lambda rows, scores: None  # what becomes of the answers

    @classmethod
    def of(cls, session: TunedSession, validation: Dataset | None) -> Examination | None:
        """The examination that the recipe asks for. Raises UserError as `score`."""
        count = session.recipe.train.eval_generate
        if count is None or validation is None:
            return None
        rows = sample_of(validation, count, session.recipe.train.seed)
        score(
            list(rows), [""] * len(rows), "validation", session.recipe.data
        )  # a metric that cannot be had is told now
        return cls(session, rows)

    def metrics(self, on_progress: Callable[[int], None]) -> dict[str, float]:
        """The scores of the model as it is now: `eval_score`, the mean over tasks, and `eval_score_TASK` of each;
        and `eval_cut`, the number of answers that were cut at `train.max_new_tokens`.

        Raises UserError as `evaluate`.
        """
        rows = [self.rows[index] for index in range(len(self.rows))]
        scores = evaluate(self.session, rows, "validation", on_progress)
        self.show(rows, scores)
        by_task = {f"{SCORE}_{task}": own.score for task, own in scores.tasks.items()}
        return {SCORE: scores.mean, CUT: scores.cut, **by_task}


def sample_of(rows: Dataset, count: int, seed: int) -> Dataset:
    """So many rows, drawn by the seed; tasks take turns, so that each has as many as can be."""
    draws = random.Random(seed)
    of_task = [draws.sample(own, len(own)) for own in indices_by_task(rows).values()]
    ranked = sorted((rank, place, index) for place, own in enumerate(of_task) for rank, index in enumerate(own))
    return rows.select(sorted(index for _, _, index in ranked[:count]))


def evaluations_since(state: TrainerState, key: str) -> int:
    """The evaluations after the best one, this one included."""
    return sum(key in log and log["step"] > (state.best_global_step or 0) for log in state.log_history)


def take_best(session: TunedSession, state: TrainerState, folder: Path) -> int | None:
    """Give the model the adapter of the best checkpoint, and the run's folder its routing; returns the step, None where
    nothing was judged. Raises UserError if the checkpoint is damaged.
    """
    best = state.best_global_step
    if best is None:
        return None
    checkpoint = folder / "checkpoints" / f"{PREFIX}{best}"
    if best != state.global_step and checkpoint.is_dir():
        load_adapter(session.model, read_weights(checkpoint), where=str(checkpoint))
        if (checkpoint / FILE).is_file() and (folder / FILE).is_file():
            with replacing(folder / FILE) as temporary:
                shutil.copyfile(checkpoint / FILE, temporary)
    return best
