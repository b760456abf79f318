"""Columns of a table and the template over them go together, or the recipe says what does not."""

from __future__ import annotations

from typing import Any

import pytest

from qmixlora.recipe import Data, edited, json_schema, template, validate

from .helpers import MINIMAL, mistakes_in

QA = {"question": "q", "answer": "a"}


def with_data(**data: Any) -> dict[str, Any]:
    return {**MINIMAL, "data": {"train": "d.json", **data}}


@pytest.mark.parametrize(
    ("columns", "text", "used"),
    [
        (QA, None, "{question}"),
        ({**QA, "options": "o"}, None, "{question}\n{options}"),
        ({**QA, "options": ["A", "B"]}, "{options} {question}", "{options} {question}"),
        ({**QA, "hint": "h"}, "{hint} {question} {{x}}", "{hint} {question} {{x}}"),
        ({**QA, "image": ["i", "j"], "task": "t"}, "{task} {image} {question}", "{task} {image} {question}"),
    ],
)
def test_a_template_over_its_columns_is_a_recipe(columns: dict[str, Any], text: str | None, used: str) -> None:
    assert validate(with_data(columns=columns, template=text), "r").data.question_template() == used


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ({"template": "{question}"}, "data.template: there is nothing to put into it; set data.columns"),
        ({"columns": {"question": "q"}}, "data.columns.answer: missing"),
        ({"columns": {"question": 3, "answer": "a"}}, "data.columns.question:"),
        ({"columns": {**QA, "anwser": "b"}}, "columns.anwser: data.template does not use it. Did you mean 'answer'?"),
        ({"columns": {**QA, "hint": 3}}, "data.columns.hint:"),
        ({"columns": {**QA, "options": "o"}, "template": "{question}"}, "data.columns.options: data.template does not"),
        ({"columns": QA, "template": "{qestion}"}, "{qestion} is not among data.columns, question. Did you mean"),
        ({"columns": QA, "template": "{question} {options}"}, "{options} is not among data.columns"),
        ({"columns": QA, "template": "{question} {image}"}, "{image} is not among data.columns"),
        ({"columns": QA, "template": "{question} {answer}"}, "{answer} would show the answer"),
        ({"columns": QA, "template": "{question!r}"}, "data.template: {question} is more than the name"),
        ({"columns": QA, "template": "{question:>9}"}, "more than the name"),
        ({"columns": QA, "template": "{question.x}"}, "more than the name"),
        ({"columns": QA, "template": "{}"}, "more than the name"),
        ({"columns": QA, "template": "{question"}, "data.template: "),
        ({"columns": {**QA, "task": "t"}, "task_field": "u"}, "remove one of the two"),
        ({"on_bad_sample": "ignore"}, "data.on_bad_sample:"),
    ],
)
def test_what_does_not_go_together_is_named(data: dict[str, Any], message: str) -> None:
    assert message in mistakes_in(with_data(**data))


def test_doubled_braces_of_a_template_are_braces() -> None:
    assert list(template.parts("{{a}} {question}")) == [("{", None), ("a}", None), (" ", "question")]


def test_a_recipe_with_columns_is_written_and_read_as_it_was() -> None:
    recipe = validate(with_data(columns={**QA, "hint": "h"}, template="{hint} {question}"), "r")
    assert validate(recipe.model_dump(), "again") == recipe and "hint: h" in recipe.to_yaml()


def test_columns_may_be_set_on_the_command_line() -> None:
    typed = ["data.columns.question=q", "data.columns.answer=a"]
    columns = edited(validate(MINIMAL, "r"), typed).data.columns
    assert columns is not None and columns.question == "q" and columns.answer == "a"


def test_the_schema_for_editors_knows_columns() -> None:
    assert "options" in json_schema()["$defs"]["Columns"]["properties"]


def test_data_without_columns_is_what_it_was() -> None:
    assert Data(train="x").columns is None and Data(train="x").on_bad_sample == "stop"
