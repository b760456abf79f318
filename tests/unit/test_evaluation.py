"""Exact match, the blind baseline, and the files they are written to."""

from __future__ import annotations

from pathlib import Path

import pytest

from qmixlora.errors import UserError
from qmixlora.evaluation import blind_baseline, normalize
from qmixlora.evaluation.answers import summarize
from qmixlora.files import write_json


def row(task: str, question: str, answer: str) -> dict[str, object]:
    return {"task": task, "turns": [{"role": "user", "text": question}, {"role": "assistant", "text": answer}]}


def test_exact_match_ignores_case_blanks_and_a_full_stop_only() -> None:
    assert normalize("  Top   left. ") == normalize("top left")
    assert normalize("top left") != normalize("left top")
    assert normalize("7") != normalize("seven")


def test_the_mean_is_over_tasks() -> None:
    result = summarize({"a": [True] * 9 + [False], "b": [False, False]}, "test")
    assert result == {
        "split": "test",
        "mean_exact_match": 0.45,
        "tasks": {"a": {"exact_match": 0.9, "count": 10}, "b": {"exact_match": 0.0, "count": 2}},
    }
    with pytest.raises(UserError, match="nothing to evaluate"):
        summarize({}, "test")


def test_the_blind_baseline_knows_questions_and_no_pictures() -> None:
    train = [row("a", "Q1", "x"), row("a", "q1", "X"), row("a", "q1", "y"), row("a", "q2", "y"), row("b", "q3", "z")]
    rows = [row("a", "q1", "x"), row("a", "q2", "x"), row("a", "new", "x"), row("c", "q3", "z"), row("c", "new", "x")]
    result = blind_baseline(train, rows, "test")
    # q1 -> x (right), q2 -> y (wrong), new in a -> x or y, both twice (first seen: x, right); q3 -> z, new -> x
    assert result["tasks"]["a"] == {"exact_match": pytest.approx(2 / 3), "count": 3}
    assert result["tasks"]["c"] == {"exact_match": 1.0, "count": 2}


def test_json_is_renamed_into_place(tmp_path: Path) -> None:
    write_json(tmp_path / "a.json", {"x": 1})
    write_json(tmp_path / "a.json", {"x": 2})
    assert [path.name for path in tmp_path.iterdir()] == ["a.json"]
    assert '"x": 2' in (tmp_path / "a.json").read_text()
