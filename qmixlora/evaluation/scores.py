"""Scores per task, from answers."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from qmixlora.data import Conversation, content_key, words
from qmixlora.errors import UserError
from qmixlora.recipe import Data
from qmixlora.session import Session

from .answers import Answer, full_answers
from .intervals import interval, interval_of_tasks
from .metrics import fitting_metric, metric_of
from .wording import normalize


@dataclass(frozen=True)
class Prediction:
    """A row's answer, and what it was compared with: `row` counts from 0 in its split."""

    row: int
    task: str
    question: str
    images: list[str | None]  # their paths, where they have some
    references: list[str]
    answer: str
    score: float
    seconds: float | None = field(default=None, compare=False)  # its share of those of its batch
    cut: bool = False  # at the longest that an answer may be: it had not ended
    image_keys: list[str] | None = None  # of their content, as `content_key`; None where the images were not read

    @property
    def shown(self) -> str:
        """Its images in words; nothing where it has none."""
        return ", ".join(path or "in the data" for path in self.images)


@dataclass(frozen=True)
class TaskScore:
    """The mean score of a task's samples by its metric (see `metrics`), the number of its samples, and of how many the
    answer was cut.
    """

    score: float
    count: int
    metric: str = "exact"
    interval: tuple[float, float] | None = None  # 95 % of the bootstrap
    cut: int = 0
    tolerance: float | None = None  # of `number`; None too where an earlier release kept none

    @property
    def measure(self) -> str:
        """The metric in words, with its tolerance where it has one."""
        return self.metric if self.tolerance is None else f"{self.metric} (tolerance {self.tolerance:g})"

    def may_be_measured_as(self, other: TaskScore) -> bool:
        """Whether both have one metric, and one tolerance as far as both are known."""
        tolerances = {self.tolerance, other.tolerance} - {None}
        return self.metric == other.metric and len(tolerances) < 2


@dataclass(frozen=True)
class Scores:
    """The scores of one model on one split, by task (at least one); every prediction, where they come from some."""

    split: str
    tasks: dict[str, TaskScore]
    predictions: list[Prediction] = field(default_factory=list)

    @property
    def mean(self) -> float:
        """The mean over tasks, each counting the same."""
        return sum(task.score for task in self.tasks.values()) / len(self.tasks)

    @property
    def cut(self) -> int:
        """The answers that were cut, of all tasks."""
        return sum(task.cut for task in self.tasks.values())

    def with_image_keys(self, rows: Sequence[Conversation]) -> Scores:
        """The scores of these rows, all their images read: where they are kept, to be compared. Raises OSError."""
        keys = [[content_key(image) for image in row["images"]] for row in rows]
        predictions = [replace(one, image_keys=own) for one, own in zip(self.predictions, keys, strict=True)]
        return replace(self, predictions=predictions)

    @cached_property
    def interval(self) -> tuple[float, float] | None:
        """95 % of the bootstrap for the mean over tasks; None without predictions."""
        return interval_of_tasks(self.by_task()) if self.predictions else None

    def by_task(self) -> dict[str, list[float]]:
        """The scores of all samples, in the order of their rows."""
        scores: dict[str, list[float]] = {}
        for prediction in self.predictions:
            scores.setdefault(prediction.task, []).append(prediction.score)
        return scores

    def of_tasks(self, tasks: Sequence[str]) -> Scores:
        """The same, of some of its tasks alone."""
        own = {name: self.tasks[name] for name in tasks}
        return Scores(self.split, own, [one for one in self.predictions if one.task in own])

    def to_dict(self) -> dict[str, Any]:
        """The scores in JSON, without the predictions."""
        tasks = {name: asdict(score) for name, score in self.tasks.items()}
        return {"split": self.split, "mean": self.mean, "interval": self.interval, "tasks": tasks}

    @classmethod
    def read(cls, summary: Path) -> Scores:
        """The scores of the file that `to_dict` went to, without predictions."""
        values = json.loads(summary.read_text(encoding="utf-8"))
        tasks = {
            name: TaskScore(
                own["score"],
                own["count"],
                own["metric"],
                tuple(own["interval"]),
                own.get("cut", 0),
                own.get("tolerance"),
            )
            for name, own in values["tasks"].items()
        }
        return cls(values["split"], tasks)

    def with_predictions(self, path: Path) -> Scores:
        """The same scores, with their predictions of the file that `write_predictions` made.

        Raises:
            ValueError: it has others.
        """
        lines = path.read_text(encoding="utf-8").split("\n")
        predictions = [Prediction(**json.loads(line)) for line in lines if line]
        counts = Counter(prediction.task for prediction in predictions)
        scored = Counter({task: own.count for task, own in self.tasks.items()})
        for task in dict.fromkeys([*scored, *counts]):
            if counts[task] != scored[task]:
                raise ValueError(f"it has {counts[task]} answers of task {task}, whose score is of {scored[task]}")
        return replace(self, predictions=predictions)

    def write_predictions(self, path: Path) -> None:
        """Write one JSON object per line, in the order of the rows."""
        lines = (json.dumps(asdict(prediction), ensure_ascii=False) for prediction in self.predictions)
        path.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")


def score(
    rows: Sequence[Conversation],
    answers: Sequence[str | Answer],
    split: str,
    data: Data | None = None,
    numbers: Sequence[int] | None = None,
) -> Scores:
    """Compare one answer per row with the row's references, or else its own last answer, by the metric of its task:
    that of `data.metrics`, or else the fitting one (`fitting_metric`). `numbers` are those of the rows in their
    split, where they are not all of it.

    Raises:
        UserError: there are no rows, or as `metric_of`.
    """
    of_task: dict[str, list[int]] = {}
    for index, row in enumerate(rows):
        of_task.setdefault(row["task"], []).append(index)
    if not of_task:
        raise UserError("There is nothing to evaluate.", where=f"split {split}")
    tasks: dict[str, TaskScore] = {}
    predictions: list[Prediction] = []
    for task, indices in sorted(of_task.items()):
        own = [rows[index] for index in indices]
        references = [_references(row) for row in own]
        name = (data and data.metric_of(task)) or fitting_metric(references)
        tolerance = data.tolerance if data else 0.0
        metric = metric_of(name, tolerance)
        said = [one if isinstance(one := answers[index], Answer) else Answer(one) for index in indices]
        scores = metric([one.text for one in said], references)
        cut = sum(one.cut for one in said)
        kept = tolerance if name == "number" else None
        tasks[task] = TaskScore(sum(scores) / len(scores), len(scores), name, interval(scores), cut, kept)
        for index, row, right, one, its in zip(indices, own, references, said, scores, strict=True):
            predictions.append(
                Prediction(
                    numbers[index] if numbers else index,
                    task,
                    *_asked(row),
                    list(right),
                    one.text,
                    its,
                    one.seconds,
                    one.cut,
                )
            )
    return Scores(split, tasks, sorted(predictions, key=lambda prediction: prediction.row))


def _references(row: Conversation) -> list[str]:
    return list(row.get("references") or [row["turns"][-1]["text"]])


def _asked(row: Conversation) -> tuple[str, list[str | None]]:
    """A row's question, and the paths of its images."""
    question = words(row["turns"][-2]["text"]) if len(row["turns"]) > 1 else ""
    return question, [image["path"] for image in row["images"]]


class UnscoredError(UserError):
    """A metric that raised over answers that were generated: they are kept in it, `predictions` without scores."""

    def __init__(self, error: Exception, split: str, predictions: list[dict[str, Any]]) -> None:
        self.split, self.predictions = split, predictions
        if isinstance(error, UserError):
            super().__init__(error.what, where=error.where, fix=error.fix)
        else:
            super().__init__(f"The metric failed with {type(error).__name__}: {error}.", where="data.metrics")


def evaluate(
    session: Session,
    rows: Sequence[Conversation],
    split: str,
    on_progress: Callable[[int], None] = lambda done: None,
    numbers: Sequence[int] | None = None,
) -> Scores:
    """Answer every row (`answer_rows`) and `score` the answers by the recipe's metrics; `numbers`, ascending,
    as there.

    Raises:
        UserError: a metric cannot be had, or fails on a sample of each task; told before anything is generated.
        UnscoredError: it fails on the answers.
    """
    data, first_of_task = session.recipe.data, list({row["task"]: row for row in rows}.values())
    score(first_of_task, [row["turns"][-1]["text"] for row in first_of_task], split, data)
    answers = full_answers(session, rows, session.recipe.train.eval_batch_size, None, on_progress)
    try:
        return score(rows, answers, split, data, numbers)
    except Exception as error:
        unscored = [
            asdict(Prediction(index, row["task"], *_asked(row), _references(row), one.text, 0.0, one.seconds, one.cut))
            for index, row, one in zip(numbers or range(len(rows)), rows, answers, strict=True)
        ]
        raise UnscoredError(error, split, [{**one, "score": None} for one in unscored]) from error


def blind_baseline(
    train: Sequence[Conversation], rows: Sequence[Conversation], split: str, data: Data | None = None
) -> Scores:
    """Score without looking: to each question, give the answer that it had most often in training.

    Where a question is new, give the most frequent answer of its task (of all tasks, if the task is new too).
    """
    counts: dict[tuple[str | None, str | None], dict[str, int]] = {}
    for row in train:
        answer = normalize(row["turns"][-1]["text"])
        for key in _keys(row):
            counts.setdefault(key, {}).setdefault(answer, 0)
            counts[key][answer] += 1
    guesses = []
    for row in rows:
        own = next(counts[key] for key in _keys(row) if key in counts)
        guesses.append(max(own, key=lambda answer: own[answer]))
    return score(rows, guesses, split, data)


def _keys(row: Conversation) -> list[tuple[str | None, str | None]]:
    """What a row's answer may be guessed from, the most telling first: its task and its question, None where either may
    be any.
    """
    question = normalize(" ".join(turn["text"] for turn in row["turns"][:-1]))
    return [(row["task"], question), (None, question), (row["task"], None), (None, None)]
