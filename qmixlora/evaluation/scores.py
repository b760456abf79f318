"""Scores per task, from answers."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from qmixlora.data import Conversation
from qmixlora.errors import UserError
from qmixlora.session import Session

from .answers import answer_rows
from .metrics import normalize


@dataclass(frozen=True)
class TaskScore:
    """The share of a task's samples that were answered exactly, and the number of its samples."""

    exact_match: float
    count: int


@dataclass(frozen=True)
class Scores:
    """The scores of one model on one split, by task (at least one)."""

    split: str
    tasks: dict[str, TaskScore]

    @property
    def mean_exact_match(self) -> float:
        """The mean over tasks, each counting the same."""
        return sum(task.exact_match for task in self.tasks.values()) / len(self.tasks)

    def to_dict(self) -> dict[str, Any]:
        """The contents of `evaluation.json`."""
        tasks = {name: asdict(score) for name, score in self.tasks.items()}
        return {"split": self.split, "mean_exact_match": self.mean_exact_match, "tasks": tasks}


def score(rows: Sequence[Conversation], answers: Sequence[str], split: str) -> Scores:
    """Compare one answer per row with the row's references: any of them, or else its own last answer.

    Raises:
        UserError: there are no rows.
    """
    hits: dict[str, list[bool]] = {}
    for row, answer in zip(rows, answers, strict=True):
        right = row.get("references") or [row["turns"][-1]["text"]]
        hits.setdefault(row["task"], []).append(normalize(answer) in map(normalize, right))
    if not hits:
        raise UserError("There is nothing to evaluate.", where=f"split {split}")
    return Scores(split, {task: TaskScore(sum(own) / len(own), len(own)) for task, own in sorted(hits.items())})


def evaluate(
    session: Session,
    rows: Sequence[Conversation],
    split: str,
    on_progress: Callable[[int], None] = lambda done: None,
) -> Scores:
    """Answer every row (`answer_rows`) and `score` the answers."""
    return score(rows, answer_rows(session, rows, on_progress=on_progress), split)


def blind_baseline(train: Sequence[Conversation], rows: Sequence[Conversation], split: str) -> Scores:
    """Score without looking: to each question, give the answer that it had most often in training.

    Where a question is new, give the most frequent answer of its task (of all tasks, if the task is new too).
    """
    counts: dict[tuple[str, ...], dict[str, int]] = {}
    for row in train:
        answer = normalize(row["turns"][-1]["text"])
        for key in _keys(row):
            counts.setdefault(key, {}).setdefault(answer, 0)
            counts[key][answer] += 1
    guesses = []
    for row in rows:
        own = next(counts[key] for key in _keys(row) if key in counts)
        guesses.append(max(own, key=lambda answer: own[answer]))
    return score(rows, guesses, split)


def _keys(row: Conversation) -> list[tuple[str, ...]]:
    """What a row's answer may be guessed from, the most telling first."""
    question = normalize(" ".join(turn["text"] for turn in row["turns"][:-1]))
    return [(row["task"], question), (question,), (row["task"],), ()]
