"""Rows by task."""

from __future__ import annotations

import datasets
import pytest

from qmixlora.data import indices_by_answer, indices_by_task, indices_of_tasks, only_tasks
from qmixlora.errors import UserError

ROWS = datasets.Dataset.from_dict({"task": ["size", "color", "size", "digit"], "number": [0, 1, 2, 3]})


def test_every_task_has_its_positions_and_tasks_are_sorted_by_name() -> None:
    assert list(indices_by_task(ROWS).items()) == [("color", [1]), ("digit", [3]), ("size", [0, 2])]


def test_a_conversation_is_found_by_the_task_of_each_of_its_answers() -> None:
    rows = datasets.Dataset.from_dict({"task": ["size", "color"], "tasks": [["color", "color", "size"], []]})
    assert list(indices_by_answer(rows).items()) == [("color", [0, 1]), ("size", [0])]
    assert list(indices_by_task(rows).items()) == [("color", [1]), ("size", [0])]


def test_a_task_whose_answers_are_not_learned_is_none() -> None:
    columns = {"task": ["a", "b"], "tasks": [["b", "a"], []], "learned": [[False, True], []]}
    assert list(indices_by_answer(datasets.Dataset.from_dict(columns)).items()) == [("a", [0]), ("b", [1])]


def test_the_rows_of_some_tasks_stay_in_their_order() -> None:
    assert only_tasks(ROWS, ["size", "color", "size"], "split test")["number"][:] == [0, 1, 2]
    assert indices_of_tasks(ROWS, ["digit", "color"], "split test") == [1, 3]


def test_a_task_that_the_data_lacks_is_named_with_those_that_it_has() -> None:
    with pytest.raises(UserError, match="no task 'shape'") as caught:
        only_tasks(ROWS, ["size", "shape"], "split test")
    assert caught.value.where == "split test" and "color, digit, size" in str(caught.value.fix)
