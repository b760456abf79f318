"""Scores per task, from answers; and the blind baseline."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path

import pytest

from qmixlora.data import IMAGE, Conversation
from qmixlora.errors import UserError
from qmixlora.evaluation import Scores, blind_baseline, score
from qmixlora.files import write_json
from qmixlora.recipe import validate


def row(task: str, question: str, answer: str) -> Conversation:
    turns = [{"role": "user", "text": question}, {"role": "assistant", "text": answer}]
    return {"task": task, "turns": turns, "images": []}


def measured(rows: list[Conversation], answers: list[str], **data: object) -> Scores:
    return score(rows, answers, "test", validate({"model": {"id": "-"}, "data": {"train": "-", **data}}, "test").data)


def test_the_mean_is_over_tasks() -> None:
    rows = [*(row("a", "q", "x") for _ in range(10)), row("b", "q", "x"), row("b", "q", "x")]
    scores = score(rows, ["x"] * 9 + ["y"] * 3, "test")
    assert {task: (own.score, own.count) for task, own in scores.tasks.items()} == {"a": (0.9, 10), "b": (0.0, 2)}
    assert scores.mean == 0.45


def test_an_answer_is_compared_with_the_last_one_of_its_row() -> None:
    first = row("a", "q1", "wrong")
    first["turns"] += row("a", "q2", "right")["turns"]
    assert score([first], ["right"], "test").tasks["a"].score == 1.0


def test_any_of_several_right_answers_is_a_hit() -> None:
    one: Conversation = {**row("a", "q", "net"), "references": ["net", "net", "Mesh."]}
    rows = [one, one, one, {**row("a", "q", "net"), "references": []}]
    assert score(rows, ["mesh", "net.", "fence", "net"], "test").tasks["a"].score == 0.75


def test_every_task_has_the_metric_that_the_recipe_names() -> None:
    rows = [row("a", "q", "100"), row("b", "q", "100"), row("c", "q", "B. red")]
    scores = measured(
        rows, ["104", "104", "(B)"], metrics={"a": "relaxed", "*": "number", "c": "choice"}, tolerance=0.01
    )
    assert {task: (own.metric, own.score) for task, own in scores.tasks.items()} == {
        "a": ("relaxed", 1),
        "b": ("number", 0),
        "c": ("choice", 1),
    }


def test_a_metric_that_is_not_there_or_is_code_is_refused_by_the_recipe() -> None:
    with pytest.raises(UserError, match=r"data\.metrics\.a: .*'rougel'; one of .*Did you mean 'rouge_l'") as caught:
        measured([], [], metrics={"a": "rougel", "b": "own:metric"})
    assert "data.metrics.b: own:metric is Python code; data.allow_code: true" in str(caught.value)


def test_scores_are_written_by_task_with_their_intervals() -> None:
    written = score([row("a", "q", "x")] * 4, ["x", "x", "x", "y"], "test").to_dict()
    assert written.keys() == {"split", "mean", "interval", "tasks"} and written["mean"] == 0.75
    assert written["tasks"].keys() == {"a"} and written["tasks"]["a"]["count"] == 4
    low, high = written["interval"]
    assert low <= 0.5 and high == 1 and written["tasks"]["a"]["interval"] == written["interval"]


def test_scores_are_read_as_they_were_written(tmp_path: Path) -> None:
    scores = score([row("a", "q\u2028", "x"), row("b", "q", "y")], ["x", "z"], "test")
    write_json(tmp_path / "scores.json", scores.to_dict())
    scores.write_predictions(tmp_path / "predictions.jsonl")
    assert Scores.read(tmp_path / "scores.json").with_predictions(tmp_path / "predictions.jsonl") == scores


def test_scores_are_read_with_the_tolerance_of_their_metric(tmp_path: Path) -> None:
    scores = measured([row("a", "q", "100"), row("b", "q", "x")], ["104", "x"], metrics={"a": "number"}, tolerance=0.1)
    assert {task: own.tolerance for task, own in scores.tasks.items()} == {"a": 0.1, "b": None}
    write_json(tmp_path / "scores.json", scores.to_dict())
    scores.write_predictions(tmp_path / "predictions.jsonl")
    assert Scores.read(tmp_path / "scores.json").with_predictions(tmp_path / "predictions.jsonl") == scores


def test_scores_of_a_release_that_did_not_count_cut_answers_are_read(tmp_path: Path) -> None:
    scores = score([row("a", "q", "x")], ["x"], "test")
    written = scores.to_dict()
    del written["tasks"]["a"]["cut"], written["tasks"]["a"]["tolerance"]
    write_json(tmp_path / "scores.json", written)
    prediction = asdict(scores.predictions[0])
    del prediction["cut"]
    (tmp_path / "predictions.jsonl").write_text(json.dumps(prediction), encoding="utf-8")
    assert Scores.read(tmp_path / "scores.json").with_predictions(tmp_path / "predictions.jsonl") == scores


def test_every_prediction_is_written_with_what_it_was_compared_with(tmp_path: Path) -> None:
    image = {"path": "/cat.png", "bytes": None}
    asked: Conversation = {**row("b", f"{IMAGE}\nq2", "y"), "images": [image], "references": ["y", "yes"]}
    score([asked, row("a", "q1", "é")], ["yes", "z"], "test").write_predictions(tmp_path / "predictions.jsonl")
    lines = (tmp_path / "predictions.jsonl").read_text(encoding="utf-8").splitlines()
    assert [json.loads(line) for line in lines] == [
        {
            "row": 0, "task": "b", "question": "q2", "images": ["/cat.png"], "references": ["y", "yes"],
            "answer": "yes", "score": 1.0, "seconds": None, "cut": False, "image_keys": None,
        },
        {
            "row": 1, "task": "a", "question": "q1", "images": [], "references": ["é"], "answer": "z", "score": 0.0,
            "seconds": None, "cut": False, "image_keys": None,
        },
    ]  # fmt: skip


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
    assert blind_baseline(TRAIN, [asked], "test").mean == 1.0, guess


def test_a_question_that_reads_as_a_tasks_name_is_another_thing() -> None:
    train = [row("a", "color", "red")] * 3 + [row("color", "which?", "blue")]
    assert blind_baseline(train, [row("color", "new", "blue")], "test").mean == 1.0


def test_the_blind_baseline_is_scored_per_task() -> None:
    rows = [row("a", "q1", "x"), row("a", "q2", "x"), row("a", "new", "x"), row("c", "q3", "z"), row("c", "new", "x")]
    scores = blind_baseline(TRAIN, rows, "test")
    assert {task: own.count for task, own in scores.tasks.items()} == {"a": 3, "c": 2}
    assert scores.tasks["a"].score == pytest.approx(2 / 3) and scores.tasks["c"].score == 1
