"""Tables of questions and answers need no conversion: columns and a template say what is meant."""

from __future__ import annotations

from typing import Any

import pytest

from qmixlora.data.formats import IMAGE, FormatError
from qmixlora.data.reading.rows import Reading, Sample, to_sample
from qmixlora.recipe import Columns, Data

ROW = {"q": "which colour ?", "a": "red", "choices": ["red", "blue"], "picture": "x.png", "kind": 0, "hint": "look"}


def read(row: dict[str, Any], template: str | None = None, **columns: Any) -> Sample:
    data = Data(train="x", columns=Columns(**{"question": "q", "answer": "a", **columns}), template=template)
    row = {**ROW, "picture": ROW["picture"] if "image" in columns else None, **row}
    return to_sample(row, Reading(columns=data.columns, template=data.question_template()))


def answer_of(answer: Any, options: Any = None) -> str:
    return read({"a": answer, "choices": options or ROW["choices"]}, options="choices").turns[1]["text"]


def test_a_question_and_its_answer_are_two_turns() -> None:
    sample = read({})
    assert [turn["text"] for turn in sample.turns] == ["which colour ?", "red"]
    assert sample.images == [] and sample.task == "all" and sample.references == []


def test_every_column_has_its_place() -> None:
    template = "{hint}: {question}\n{options}\n{{a letter}}"
    sample = read({"a": 0}, template, image="picture", options="choices", task="kind", hint="hint")
    assert sample.turns[0]["text"] == f"{IMAGE}\nlook: which colour ?\nA. red\nB. blue\n{{a letter}}"
    assert sample.turns[1]["text"] == "A" and sample.images == ["x.png"] and sample.task == "0"


def test_pictures_stand_where_the_template_puts_them() -> None:
    sample = read({"other": None}, "{question} {image}", image=["picture", "other"])
    assert sample.turns[0]["text"] == f"which colour ? {IMAGE}"


def test_marks_in_a_question_place_its_pictures() -> None:
    assert read({"q": "is <image> red ?"}, image="picture").turns[0]["text"] == f"is {IMAGE} red ?"


@pytest.mark.parametrize(
    "options",
    [
        ["red", 7],
        {"A": "red", "B": 7},
        {"text": ["red", 7], "label": ["A", "B"]},
        '["red", 7]',
        "['red', 7]",
        "('red', 7)",
        "['red' '7']",
    ],
    ids=str,
)
def test_options_are_lettered_lines_whatever_holds_them(options: Any) -> None:
    assert read({"choices": options}, options="choices").turns[0]["text"] == "which colour ?\nA. red\nB. 7"


def test_options_may_be_columns_of_their_own_of_which_the_last_are_empty() -> None:
    row = {"A": "red", "B": "blue", "C": "", "D": None}
    assert read(row, options=["A", "B", "C", "D"]).turns[0]["text"] == "which colour ?\nA. red\nB. blue"


@pytest.mark.parametrize(
    ("answer", "options", "learned"),
    [
        (1, None, "B"),
        ("1", None, "B"),
        ("B", None, "B"),
        ("blue", None, "blue"),
        ("3", ["3", "4"], "3"),
        (4, [3, 4], "4"),
        ("It is red.", None, "It is red."),
    ],
)
def test_a_number_counts_the_options_and_a_text_stands_as_it_is(answer: Any, options: Any, learned: str) -> None:
    assert answer_of(answer, options) == learned


@pytest.mark.parametrize(
    ("answer", "options", "message"),
    [
        (1, [1, 2], "the number of one option and the text of another"),
        (2, None, "2 options, which are counted from 0"),
        (0.5, None, "neither an option nor the number of one"),
        ("A", ["B", "A"], "the letter of one option and the text of another"),
        ("A", "red, blue", "no list of options, in JSON or as Python"),
        ("A", {"x": "red"}, "keys are not the letters"),
        ("A", 3, "a number as 'choices'"),
        ("A", [None, "x"], "null as an option"),
        ("A", ["x"] * 27, "27 options"),
    ],
)
def test_what_may_be_meant_in_two_ways_or_none_is_refused(answer: Any, options: Any, message: str) -> None:
    with pytest.raises(FormatError, match=message):
        answer_of(answer, options)


@pytest.mark.parametrize(
    ("answers", "learned"),
    [
        (["a", "b", "b"], "b"),
        (["a", "b"], "a"),
        ([{"answer": "a", "answer_id": 1}, {"answer": "b"}, {"answer": "b"}], "b"),
    ],
)
def test_of_several_answers_the_most_frequent_is_learned_and_all_are_kept(answers: list[Any], learned: str) -> None:
    sample = read({"a": answers})
    assert sample.turns[1]["text"] == learned and len(sample.references) == len(answers)


def test_a_number_as_an_answer_is_its_text() -> None:
    assert read({"a": 7}).turns[1]["text"] == "7"


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"a": None}, "null as an answer"),
        ({"a": True}, "true as an answer"),
        ({"a": float("nan")}, "NaN as an answer"),
        ({"a": {"answer": "x"}}, "an object as an answer"),
        ({"a": []}, "an empty list as 'a'"),
        ({"a": ["x", None]}, "null as an answer"),
        ({"a": [{"answer": None}]}, "null as an answer"),
        ({"a": " "}, "nothing but white space as an answer"),
        ({"a": ""}, "nothing as an answer"),
        ({"a": "\u200b"}, "nothing but white space as an answer"),
        ({"q": None}, "null as 'q'"),
        ({"q": "<video> what ?"}, "video is not read"),
    ],
    ids=str,
)
def test_a_bad_cell_is_named(row: dict[str, Any], message: str) -> None:
    with pytest.raises(FormatError, match=message):
        read(row)


@pytest.mark.parametrize(
    ("beside", "message"),
    [
        ({"history": [["hi", "ho"]]}, "has 'history', which is not read"),
        ({"tools": [{"name": "look"}]}, "has 'tools'; calls of tools are not learned"),
        ({"label": False}, "has 'label': false, so that its answers are not to be learned; leave the row out"),
        ({"weight": 0}, "has 'weight': 0, so that its answers are not to be learned; leave the row out"),
        ({"weight": "0"}, "has 'weight': 0, so that"),
        ({"train": "False"}, "has 'train': false, so that"),
        ({"loss_mask": 0.0}, "has 'loss_mask': 0.0, so that"),
    ],
    ids=str,
)
def test_a_row_that_teaches_something_else_than_its_answer_is_refused(beside: dict[str, Any], message: str) -> None:
    with pytest.raises(FormatError, match=message):
        read(beside)


@pytest.mark.parametrize(
    "beside",
    [{"history": "of Rome"}, {"label": 0}, {"label": "False"}, {"weight": 70.5, "loss": "heavy", "train": "ICE 1"}],
    ids=str,
)
def test_columns_that_have_such_names_by_chance_are_ignored(beside: dict[str, Any]) -> None:
    assert read(beside) == read({})


def test_a_column_that_is_named_says_what_it_is_named_for() -> None:
    assert read({"weight": "0"}, answer="weight").turns[1]["text"] == "0"
    assert read({"tools": "saw"}, "{tools} {question}", tools="tools").turns[0]["text"] == "saw which colour ?"
    assert read({"weight": 0}, task="weight").task == "0"


def test_a_column_that_is_not_there_is_named_with_those_that_are() -> None:
    with pytest.raises(FormatError, match=r"no column 'b', which data.columns names; its columns are \['a', 'choices'"):
        read({}, answer="b")


@pytest.mark.parametrize("hint", [{"hint": None}, {"hint": " "}, {"hint": "", "choices": None}], ids=str)
def test_lines_with_nothing_in_their_columns_are_left_out(hint: dict[str, Any]) -> None:
    template = "Hint: {hint}\n{question}\n{hint} {options}\nAnswer."
    text = read({"choices": [], **hint}, template, options="choices", hint="hint").turns[0]["text"]
    assert text == "which colour ?\nAnswer."
    lacking = {"q": "which colour ?", "a": "red"}
    columns = Columns.model_validate({"question": "q", "answer": "a", "options": ["A", "B"], "hint": "hint"})
    assert to_sample(lacking, Reading(columns=columns, template=template)).turns[0]["text"] == text


def test_a_line_with_something_in_one_of_its_columns_stays() -> None:
    assert read({"hint": ""}, "({hint}) {question}\n", hint="hint").turns[0]["text"] == "() which colour ?\n"


def test_a_letter_of_no_option_is_refused() -> None:
    with pytest.raises(FormatError, match="the answer 'C' and 2 options, from A to B"):
        answer_of("C")
    assert answer_of("C", ["x", "C"]) == "C" and answer_of("B") == "B"


@pytest.mark.parametrize("answer", [1.0, "1.0", " 1 "])
def test_a_number_that_reads_like_another_option_is_refused_however_it_is_written(answer: Any) -> None:
    with pytest.raises(FormatError, match="the number of one option and the text of another"):
        answer_of(answer, ["1", "2"])
    assert answer_of(answer) == "B"
