"""What a table's answers say as a whole."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy
import pytest

from qmixlora.data.reading import store
from qmixlora.data.reading.loading import Loaded, load
from qmixlora.data.reading.rows import Reading
from qmixlora.errors import UserError
from qmixlora.recipe import Columns

FOUR = ["red", "green", "blue", "grey"]
COLUMNS = Columns(question="question", answer="answer", options="options")
OTHERWISE = ["Green", "blue.", "none", "red or grey"]


def read(folder: Path, answers: list[Any], options: list[str] | None = None) -> Loaded:
    rows = [{"question": f"which ? {at}", "answer": answer, "options": options} for at, answer in enumerate(answers)]
    path = folder / "a.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return load(str(path), "train", None, Reading(columns=COLUMNS, template="{question}\n{options}"))


@pytest.mark.parametrize("answers", [[1, 4], ["1", "4", "2"], [1.0, 4.0], [1, 2] * 10, [[1, 4]]], ids=str)
def test_options_that_are_counted_from_1_are_refused(answers: list[Any], tmp_path: Path) -> None:
    with pytest.raises(UserError, match="none is 0") as caught:
        read(tmp_path, answers, FOUR)
    assert "letters" in caught.value.fix and caught.value.where.endswith("a.jsonl")


@pytest.mark.parametrize(
    ("answers", "options", "learned"),
    [
        ([0, 3, 1], FOUR, "ADB"),
        ([1, 2] * 5, FOUR, "BC" * 5),  # few: by chance
        ([1] * 30, ["no", "yes"], "B" * 30),  # one of two: a table may be in order
        ([1] * 30, FOUR, "B" * 30),
        (["2.0", 1.0, 0.0], FOUR, "CBA"),
    ],
)
def test_numbers_that_may_be_counted_from_0_are(
    answers: list[Any], options: list[str], learned: str, tmp_path: Path
) -> None:
    loaded = read(tmp_path, answers, options)
    assert "".join(turns[-1]["text"] for turns in loaded.rows["turns"]) == learned and not loaded.refused.doubts


def test_answers_beside_their_options_are_told_with_examples(tmp_path: Path) -> None:
    [doubt] = read(tmp_path, ["red", "blue", *OTHERWISE, "x" * 100], FOUR).refused.doubts
    assert doubt.startswith("5 of 7 answers are none of their options")
    assert "('Green', 'blue.', 'none', ...)" in doubt


def test_answers_by_letters_and_by_texts_are_told(tmp_path: Path) -> None:
    [doubt] = read(tmp_path, ["A", "B", "red"], FOUR).refused.doubts
    assert "2 answers name an option by its letter and 1 by its text" in doubt


@pytest.mark.parametrize(
    "answers", [["A", "B"], ["red"], OTHERWISE, [0, 1]], ids=["letters", "texts", "free", "numbers"]
)
def test_answers_of_one_form_are_no_doubt(answers: list[Any], tmp_path: Path) -> None:
    assert not read(tmp_path, answers, FOUR).refused.doubts


@pytest.mark.parametrize(
    ("answers", "is_told"),
    [([2.0, 0.0, 3.0], True), (["2.0", "many"], True), ([2.0, 2.5], False), ([2.0, 1], False), ([2, 3], False)],
)
def test_integers_that_were_written_as_decimals_are_told(answers: list[Any], is_told: bool, tmp_path: Path) -> None:
    doubts = read(tmp_path, answers).refused.doubts
    assert [doubt.startswith(f"{len(answers) - (answers[-1] == 'many')} answers are whole") for doubt in doubts] == (
        [True] if is_told else []
    )


def learned_of(loaded: Loaded) -> list[tuple[str, list[str]]]:
    """The answer of each row, and all right ones."""
    return [(row["turns"][-1]["text"], row["references"]) for row in loaded.rows]


@pytest.mark.parametrize("form", ["json", "pandas", "numpy", "objects"])
def test_lists_of_answers_that_were_written_as_texts_are_lists(form: str, tmp_path: Path) -> None:
    """A cell of a table of texts holds them so, and pandas writes them."""
    lists = [["red", "pink", "pink"], ["blue"], ["it's", "it's", "its"]]
    write = {
        "json": json.dumps,
        "pandas": str,
        "numpy": lambda own: str(numpy.array(own)),
        "objects": lambda own: json.dumps([{"answer": one, "answer_id": at} for at, one in enumerate(own)]),
    }[form]
    loaded = read(tmp_path, [write(own) for own in lists])
    assert learned_of(loaded) == [("pink", lists[0]), ("blue", []), ("it's", lists[2])]
    [doubt] = loaded.refused.doubts
    assert doubt.startswith("3 of 3 answers are lists of texts") and "are read as several right answers" in doubt


@pytest.mark.parametrize(
    "answers",
    [["[12, 30, 44, 50]"] * 2, ['["a", 3]'], ["[]", "()"], ["[red] or [blue]"], ["['a'"], ['"red"', "'a', 'b'"]],
    ids=str,
)
def test_answers_that_are_no_lists_of_texts_stay_as_they_stand(answers: list[str], tmp_path: Path) -> None:
    loaded = read(tmp_path, answers)
    assert learned_of(loaded) == [(answer, []) for answer in answers] and not loaded.refused.doubts


def test_a_list_beside_answers_that_are_none_is_told(tmp_path: Path) -> None:
    loaded = read(tmp_path, ["red", "['red', 'pink']", '["blue"]'])
    assert learned_of(loaded)[1] == ("['red', 'pink']", [])
    [doubt] = loaded.refused.doubts
    assert doubt.startswith("2 of 3 answers are lists of texts, written as a text") and "['red', 'pink']" in doubt


def test_doubts_are_kept_with_the_rows_of_a_large_source(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(store, "SMALL", 0)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    first, second = (read(tmp_path, ["A", "red"], FOUR).refused.doubts for _ in range(2))
    assert first == second and len(first) == 1
