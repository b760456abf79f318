"""Which checkpoint a run keeps: the one that answers best on a sample of validation, or has the lowest loss there."""

from __future__ import annotations

import random
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from datasets import Dataset
from transformers import TrainerCallback
from transformers.trainer_callback import ExportableState, TrainerState

from qmixlora import processes
from qmixlora.adapter import load_adapter, read_weights
from qmixlora.data import SCORED, Conversation, fingerprint, indices_by_task
from qmixlora.evaluation import Scores, evaluate, score
from qmixlora.files import replacing
from qmixlora.mixlora.routing_record import FILE
from qmixlora.recipe import Recipe
from qmixlora.session import TunedSession

from .checkpoints import checkpoint_at, damage

SCORE, LOSS, CUT = "eval_score", "eval_loss", "eval_cut"  # of an evaluation, as Trainer and trackers name them


def judged_by(recipe: Recipe) -> str | None:
    """What decides which checkpoint is the best; None for a run that keeps its last step."""
    spec = recipe.train
    return SCORE if spec.eval_generate else LOSS if spec.early_stopping else None


class Judge(TrainerCallback, ExportableState):
    """What decides which checkpoint is the best, as every checkpoint remembers it: `by`, the metric and all that its
    value depends on but the adapter; None for a run that keeps its last step.

    A resumed run that is judged by something else, or whose best checkpoint is no longer there, has no best step until
    its next evaluation. `since` is the step from which evaluations are judged alike.
    """

    def __init__(self, by: Mapping[str, Any] | None = None, say: Callable[[str], None] = lambda text: None) -> None:
        self.by, self.say = by, say
        self.since = 0

    @classmethod
    def of(cls, recipe: Recipe, validation: Dataset | None, say: Callable[[str], None]) -> Judge:
        """The judge that the recipe asks for, who says why the best step is no longer the best."""
        metric = judged_by(recipe)
        if metric is None or validation is None:
            return cls(say=say)
        rows = fingerprint(validation, SCORED) if metric == SCORE else fingerprint(validation)
        by: dict[str, Any] = {"metric": metric, "rows": rows}
        if metric == SCORE:
            data, spec = recipe.data, recipe.train
            by |= {"samples": spec.eval_generate, "max_new_tokens": spec.max_new_tokens}
            by |= {"metrics": dict(data.metrics), "tolerance": data.tolerance}
        return cls(by, say)

    def state(self) -> dict[str, Any]:
        """What Trainer writes into a checkpoint."""
        return {"args": {"by": self.by}, "attributes": {"since": self.since}}

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        before = state.stateful_callbacks.get(type(self).__name__, Judge().state())
        self.since, best = before["attributes"]["since"], state.best_global_step
        problem = None
        if before["args"]["by"] != self.by:
            problem = "it was judged by something else"
        elif best not in (None, state.global_step):
            problem = processes.from_main(lambda: _why_unusable(checkpoint_at(args.output_dir, best)))
        if problem is not None:
            self.since = state.global_step
            state.best_metric = state.best_global_step = state.best_model_checkpoint = None
            if best is not None:
                then = "evaluations from here on decide" if self.by else "the last step is kept"
                self.say(f"Step {best} no longer counts as the best ({problem}): {then}.")
        state.stateful_callbacks[type(self).__name__] = self.state()  # Trainer renews what is there already


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
        # a metric that cannot be had is told now
        score(list(rows), [""] * len(rows), "validation", session.recipe.data)
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


def _why_unusable(checkpoint: Path) -> str | None:
    """Why a checkpoint cannot be taken any more, None if it can."""
    if not checkpoint.is_dir():
        return "its checkpoint is gone"
    problem = damage(checkpoint)
    return problem and f"of its checkpoint, {problem}"


def evaluations_since(state: TrainerState, key: str) -> int:
    """The evaluations after the best one, this one included; where there is none, those by the judge of today."""
    callbacks: Any = state.stateful_callbacks
    after = state.best_global_step or callbacks[Judge.__name__]["attributes"]["since"]
    return sum(key in log and log["step"] > after for log in state.log_history)


def wins_a_tie(state: TrainerState, key: str, metrics: Mapping[str, float]) -> bool:
    """Whether an evaluation whose score is that of the best one has a lower validation loss than it."""
    if key != SCORE or metrics[SCORE] != state.best_metric:
        return False
    of_best = (log for log in reversed(state.log_history) if SCORE in log and log["step"] == state.best_global_step)
    return metrics[LOSS] < next(of_best)[LOSS]


def take_best(session: TunedSession, state: TrainerState, folder: Path) -> int | None:
    """Give the model the adapter of the best checkpoint, and the run's folder its routing; returns the step that the
    model is of then: the last where the checkpoint is gone, None where nothing was judged. Raises UserError if the
    checkpoint is damaged.
    """
    best = state.best_global_step
    if best in (None, state.global_step):
        return best
    checkpoint = checkpoint_at(folder / "checkpoints", best)
    if not checkpoint.is_dir():
        return state.global_step
    load_adapter(session.model, read_weights(checkpoint), where=str(checkpoint))
    if (checkpoint / FILE).is_file():
        with replacing(folder / FILE) as temporary:
            shutil.copyfile(checkpoint / FILE, temporary)
    return best
