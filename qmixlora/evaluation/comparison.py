"""Models side by side: their scores on the same samples, and whether a difference is one."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from qmixlora.errors import UserError

from .intervals import LEVEL, p_value, paired_interval
from .scores import Prediction, Scores


@dataclass(frozen=True)
class Difference:
    """How far a model's mean over some tasks is from the first one's, with the paired 95 % interval, and how often
    models that are equally good are as far apart (`p_value`).
    """

    points: float
    interval: tuple[float, float]
    p_value: float

    @property
    def is_one(self) -> bool:
        """Whether p is below 0.05: the interval of few samples is too narrow to tell."""
        return self.p_value < LEVEL

    @classmethod
    def between(cls, one: Scores, other: Scores, tasks: Sequence[str]) -> Difference:
        """How far the mean of one over some tasks is from that of the other, on the same samples."""
        one, other = one.of_tasks(tasks), other.of_tasks(tasks)
        scores, others = one.by_task(), other.by_task()
        return cls(one.mean - other.mean, paired_interval(scores, others), p_value(scores, others))


@dataclass(frozen=True)
class Comparison:
    """Some models' scores on the same samples, by name; differences of all but the first from the first, over all tasks
    and by task. `left_out` are tasks that not all of them were asked.
    """

    scores: Mapping[str, Scores]
    means: Mapping[str, Difference]
    tasks: Mapping[str, Mapping[str, Difference]]
    left_out: Sequence[str] = ()

    def to_dict(self) -> dict[str, Any]:
        """The JSON of `qmixlora compare`."""
        return {
            "scores": {name: one.to_dict() for name, one in self.scores.items()},
            "differences": {
                name: {
                    "mean": asdict(difference),
                    "tasks": {task: asdict(own) for task, own in self.tasks[name].items()},
                }
                for name, difference in self.means.items()
            },
            "left_out": list(self.left_out),
        }


def compare(scores: Mapping[str, Scores]) -> Comparison:
    """Compare two models or more with the first of them, on the tasks that all were asked: an export is of some.

    Raises:
        UserError: they were not asked the same, or not measured by the same metrics and tolerance.
    """
    tasks_of_any = dict.fromkeys(task for own in scores.values() for task in own.tasks)
    common = [task for task in tasks_of_any if all(task in own.tasks for own in scores.values())]
    if not common:
        told = "; ".join(f"{name} {', '.join(own.tasks)}" for name, own in scores.items())
        raise UserError(f"They were not asked the same: they have no task in common ({told}).", where="tasks")
    scores = {name: own.of_tasks(common) for name, own in scores.items()}
    (first, reference), *others = scores.items()
    means, tasks = {}, {}
    for name, other in others:
        _check_the_same(first, reference, name, other)
        means[name] = Difference.between(other, reference, common)
        tasks[name] = {task: Difference.between(other, reference, [task]) for task in common}
    return Comparison(scores, means, tasks, [task for task in tasks_of_any if task not in common])


def _check_the_same(first: str, reference: Scores, name: str, other: Scores) -> None:
    for one, two in zip(reference.predictions, other.predictions, strict=False):
        if _asked(one) != _asked(two):
            raise UserError(
                f"They were not asked the same: sample {one.row} is {one.question!r} for {first}, "
                f"{two.question!r} (sample {two.row}) for {name}.",
                where=f"split {reference.split}",
                fix="Evaluate both on one file, `qmixlora eval RUN --data F.json`, and compare by --split file-F.",
            )
        if None not in (one.image_keys, two.image_keys) and one.image_keys != two.image_keys:
            raise UserError(
                f"They were not asked the same: sample {one.row}, {one.question!r}, shows other images for {first} "
                f"({one.shown or 'none'}) than for {name} ({two.shown or 'none'}).",
                where=f"split {reference.split}",
                fix="Evaluate both on the same images.",
            )
    if len(reference.predictions) != len(other.predictions):
        raise UserError(
            f"They were not asked the same: {first} has {len(reference.predictions)} answers, {name} "
            f"{len(other.predictions)}.",
            where=f"split {reference.split}",
            fix="Evaluate both on the whole of one split.",
        )
    for task, own in reference.tasks.items():
        if not own.may_be_measured_as(other.tasks[task]):
            raise UserError(
                f"Task {task} was measured by {own.measure} for {first} and by {other.tasks[task].measure} for {name}.",
                where="data.metrics, data.tolerance",
                fix="Give both the same metric and tolerance, and evaluate again.",
            )


def _asked(prediction: Prediction) -> tuple[object, ...]:
    return prediction.task, prediction.question, prediction.references
