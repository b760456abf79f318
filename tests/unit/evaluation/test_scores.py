"""Scores per task, from answers; and the blind baseline."""

from __future__ import annotations

import pytest

from qmixlora.data import Conversation
from qmixlora.errors import UserError
from qmixlora.evaluation import Scores, TaskScore, blind_baseline, score


def row(task: str, question: str, answer: str) -> Conversation:
    turns = [{"role": "user", "text": question}, {"role": "assistant", "text": answer}]
    return {"task": task, "turns": turns, "images": []}


def test_the_mean_is_over_tasks() -> None:
    rows = [*(row("a", "q", "x") for _ in range(10)), row("b", "q", "x"), row("b", "q", "x")]
    scores = score(rows, ["x"] * 9 + ["y"] * 3, "test")
    assert scores.tasks == {"a": TaskScore(0.9, 10), "b": TaskScore(0.0, 2)}
    assert scores.mean_exact_match == 0.45


def test_an_answer_is_compared_with_the_last_one_of_its_row() -> None:
    first = row("a", "q1", "wrong")
    first["turns"] += row("a", "q2", "right")["turns"]
    assert score([first], ["right"], "test").tasks["a"].exact_match == 1.0


def test_any_of_several_right_answers_is_a_hit() -> None:
    one: Conversation = {**row("a", "q", "net"), "references": ["net", "net", "Mesh."]}
    rows = [one, one, one, {**row("a", "q", "net"), "references": []}]
    assert score(rows, ["mesh", "net.", "fence", "net"], "test").tasks["a"].exact_match == 0.75


def test_scores_are_written_by_task() -> None:
    assert Scores("test", {"a": TaskScore(0.9, 10), "b": TaskScore(0.0, 2)}).to_dict() == {
        "split": "test",
        "mean_exact_match": 0.45,
        "tasks": {"a": {"exact_match": 0.9, "count": 10}, "b": {"exact_match": 0.0, "count": 2}},
    }


def test_without_rows_there_is_nothing_to_evaluate() -> None:
    with pytest.raises(UserError, match="nothing to evaluate"):
        score([], [], "test")


TRAIN = [row("a", "Q1", "x"), row("a", "q1", "X"), row("a", "q1", "y"), row("a", "q2", "y"), row("b", "q3", "z")]


@pytest.mark.parametrize(
    ("asked", "guess"),
    [
        (row("a", "q1", "x"), "the question's most frequent answer"),
        (row("a", "q2", "y"), "the question's most frequent answer"),
        (row("a", "new", "x"), "a new question: the task's most frequent answer, the first one seen of equals"),
        (row("c", "q3", "z"), "a new task: the question's answer in any other"),
        (row("c", "new", "x"), "a new task and question: the most frequent answer of all"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_the_blind_baseline_knows_questions_and_no_images(asked: Conversation, guess: str) -> None:
    assert blind_baseline(TRAIN, [asked], "test").mean_exact_match == 1.0, guess


def test_the_blind_baseline_is_scored_per_task() -> None:
    rows = [row("a", "q1", "x"), row("a", "q2", "x"), row("a", "new", "x"), row("c", "q3", "z"), row("c", "new", "x")]
    scores = blind_baseline(TRAIN, rows, "test")
    assert scores.tasks == {"a": TaskScore(pytest.approx(2 / 3), 3), "c": TaskScore(1.0, 2)}
