"""The files of results, and which of them is at fault."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from qmixlora.data import Conversation
from qmixlora.errors import UserError
from qmixlora.evaluation import Scores, score, write_results
from qmixlora.evaluation.results import read_results


def scores_of(count: int, task: str = "a") -> Scores:
    turns = [{"role": "user", "text": "q"}, {"role": "assistant", "text": "x"}]
    rows: list[Conversation] = [{"task": task, "turns": turns, "images": []} for _ in range(count)]
    return score(rows, ["x"] * count, "test")


def test_results_are_read_as_they_were_written(tmp_path: Path) -> None:
    write_results(tmp_path, scores_of(2))
    assert read_results(tmp_path, "test") == scores_of(2)


@pytest.mark.parametrize("damage", ["", "{", "[]", "{}", '{"split": "test", "tasks": []}'])
@pytest.mark.parametrize("name", ["evaluation.json", "predictions.jsonl"])
def test_the_damaged_file_is_the_one_that_is_named(tmp_path: Path, name: str, damage: str) -> None:
    write_results(tmp_path, scores_of(2))
    (tmp_path / name).write_text(damage, encoding="utf-8")
    with pytest.raises(UserError, match=f"^{name} cannot be read: ") as caught:
        read_results(tmp_path, "test")
    assert caught.value.where == str(tmp_path / name) and "qmixlora eval" in str(caught.value)


@pytest.mark.parametrize(
    ("task", "count", "said"), [("a", 3, "3 answers of task a, whose score is of 2"), ("b", 2, "0 .* a")]
)
def test_answers_of_another_evaluation_are_not_those_of_the_scores(
    tmp_path: Path, task: str, count: int, said: str
) -> None:
    """As where a crash came between the two files."""
    write_results(tmp_path, scores_of(2))
    scores_of(count, task).write_predictions(tmp_path / "predictions.jsonl")
    with pytest.raises(UserError, match=f"predictions.jsonl cannot be read: it has {said}"):
        read_results(tmp_path, "test")
    both = [*scores_of(2).predictions, *scores_of(1, "c").predictions]
    replace(scores_of(2), predictions=both).write_predictions(tmp_path / "predictions.jsonl")
    with pytest.raises(UserError, match="1 answers of task c, whose score is of 0"):
        read_results(tmp_path, "test")
