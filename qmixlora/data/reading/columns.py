"""Plain columns to turns: a question, put together by a template, and its answer or answers."""

from __future__ import annotations

import ast
import io
import json
import re
import tokenize
from collections import Counter
from collections.abc import Mapping, Sequence
from contextlib import suppress
from string import ascii_uppercase
from typing import Any, Literal

from qmixlora.data.formats import FormatError
from qmixlora.recipe import Columns
from qmixlora.recipe.template import parts

from .spoken import Picture, Spoken
from .texts import is_blank, kind, written

WHOLE = re.compile(r"(\d+)(\.0)?")


def spoken_in_columns(
    row: Mapping[str, Any], columns: Columns, template: str, pictures: int
) -> tuple[list[Spoken], list[str]]:
    """A question and its answer as two turns, and all right answers (none where there is one alone).

    Options are lettered lines, `A. red`. Of several answers the one that is given most often is learned, the first one
    of equals. A whole number as an answer to a question with options counts them from 0 and means the option's letter;
    where it could as well mean an option that reads so it is refused. A row may lack options, and texts other than its
    question: lines of the template that would hold nothing else are left out.

    Raises:
        FormatError: a question, an answer or a task that the row lacks, or a value that is not what its column is for.
    """
    options = options_of(row, columns)
    question = _question(row, columns, template, options, pictures)
    answers = [_answer(answer, options) for answer in answers_of(row, columns)]
    learned = Counter(answers).most_common(1)[0][0]
    turns = [Spoken("user", question), Spoken("assistant", [learned])]
    return turns, answers if len(answers) > 1 else []


def optional(columns: Columns) -> set[str]:
    """The columns that a row may lack, or have nothing in: pictures, options, and texts other than the question."""
    one_or_several = (columns.image or [], columns.options or [])
    listed = [name for names in one_or_several for name in ([names] if isinstance(names, str) else names)]
    return {*listed, *columns.texts().values()} - {columns.question}


def named(columns: Columns) -> set[str | None]:
    """All columns that a recipe names."""
    return {columns.question, columns.answer, columns.task, *optional(columns)}


def _question(
    row: Mapping[str, Any], columns: Columns, template: str, options: Sequence[str], pictures: int
) -> list[str | Picture]:
    """The template's lines, but for those that have names of columns, all of them with nothing in this row."""

    def value(name: str) -> list[str | Picture]:
        if name == "image":
            return [Picture()] * pictures
        if name == "options":
            return ["\n".join(f"{ascii_uppercase[at]}. {option}" for at, option in enumerate(options))]
        column = str(columns.task) if name == "task" else columns.texts()[name]
        if name not in {"question", "task"} and is_blank(row.get(column)):
            return [""]
        return [written(value_of(row, column), f"{column!r}")]

    lines: list[list[str | Picture]] = []
    for line in template.split("\n"):
        pieces = [(text, name, [] if name is None else value(name)) for text, name in parts(line)]
        named = [values for _, name, values in pieces if name is not None]
        if not named or any(values != [""] for values in named):
            lines.append([part for text, _, values in pieces for part in (text, *values)])
    return [part for number, line in enumerate(lines) for part in (["\n"] * (number > 0) + line)]


def value_of(row: Mapping[str, Any], column: str) -> Any:
    """A cell of a row. Raises FormatError for a column that is not there."""
    if column not in row:
        have = sorted(map(str, row))
        raise FormatError(f"has no column {column!r}, which data.columns names; its columns are {have}")
    return row[column]


def answers_of(row: Mapping[str, Any], columns: Columns) -> list[Any]:
    """The right answers of a row. Raises FormatError where it has none."""
    value, column = value_of(row, columns.answer), columns.answer
    if not isinstance(value, list):
        return [value]
    if not value:
        raise FormatError(f"has an empty list as {column!r}")
    return [one["answer"] if isinstance(one, Mapping) and "answer" in one else one for one in value]


def listed_answers(value: Any) -> list[Any] | None:
    """The answers that a text lists, each a text or an object with one (`answer`); None for what is no such text."""
    if not isinstance(value, str) or not (value.lstrip().startswith("[") and value.rstrip().endswith("]")):
        return None
    try:
        answers = _parsed(value)
    except ValueError:
        return None
    texts = [one.get("answer") if isinstance(one, Mapping) else one for one in answers]
    return answers if texts and all(isinstance(text, str) for text in texts) else None


def named_by(text: str, options: Sequence[str]) -> Literal["text", "letter", "number"] | None:
    """How an answer names an option, be there such a one or not; None where it does not."""
    number = number_in(text)
    if text in options or str(number) in options:
        return "text"
    if len(text) == 1 and text in ascii_uppercase:
        return "letter"
    return None if number is None else "number"


def number_in(text: str) -> int | None:
    """The number of an option that a text is: a whole one, which a table of integers that lacks one writes `2.0`."""
    found = WHOLE.fullmatch(text.strip())
    return int(found[1]) if found else None


def _answer(value: Any, options: Sequence[str]) -> str:
    """An answer as it stands; the letter of an option where it is the option's number."""
    text, letters = written(value, "an answer"), ascii_uppercase[: len(options)]
    number = number_in(text)
    if not options:
        return text
    if isinstance(value, str) and text in options:
        if text in letters and options.index(text) != letters.index(text):
            raise FormatError(f"has the answer {text!r}, the letter of one option and the text of another")
        return text
    if number is None:
        if not isinstance(value, str):
            raise FormatError(f"has the answer {text}, which is neither an option nor the number of one")
        if named_by(text, options) == "letter" and text not in letters:
            raise FormatError(f"has the answer {text!r} and {len(options)} options, from A to {letters[-1]}")
        return text
    if str(number) in options and number < len(options):
        raise FormatError(f"has the answer {text}, the number of one option and the text of another; name the letter")
    if str(number) in options:
        return str(number)
    if number >= len(options):
        raise FormatError(f"has the answer {text} and {len(options)} options, which are counted from 0")
    return letters[number]


def options_of(row: Mapping[str, Any], columns: Columns) -> list[str]:
    """The options of a row; none where it has nothing in their column or columns."""
    column = columns.options
    if not column:
        return []
    if isinstance(column, list):
        values = _in_cells(row, column)
    else:
        values = [] if is_blank(row.get(column)) else _in_one_cell(row[column], column)
    if len(values) > len(ascii_uppercase):
        raise FormatError(f"has {len(values)} options; {len(ascii_uppercase)} have a letter")
    return [written(value, "an option") for value in values]


def _in_cells(row: Mapping[str, Any], columns: list[str]) -> list[Any]:
    cells = [row.get(name) for name in columns]
    while cells and is_blank(cells[-1]):  # questions with fewer options than the table has columns
        cells.pop()
    return cells


def _in_one_cell(values: Any, column: str) -> list[Any]:
    if isinstance(values, str):  # what a table of texts holds
        values = _listed(values, column)
    if isinstance(values, Mapping):
        values = _of_mapping(values, column)
    if not isinstance(values, list | tuple):
        raise FormatError(f"has {kind(values)} as {column!r}, not a list of options")
    return list(values)


def _listed(text: str, column: str) -> Any:
    try:
        return _parsed(text)
    except ValueError:
        raise FormatError(
            f"has a text as {column!r} that is no list of options, in JSON or as Python writes it"
        ) from None


def _parsed(text: str) -> Any:
    """What is written in a text. Raises ValueError."""
    for read in (json.loads, _of_python):  # Python's own form is what pandas writes, and MMMU holds
        with suppress(ValueError, SyntaxError, RecursionError, MemoryError):
            return read(text)
    raise ValueError("no value of JSON or Python")


def _of_python(text: str) -> Any:
    """A value as Python writes it, or texts as NumPy does: without commas, so that Python would join them."""
    value = ast.literal_eval(text.strip())
    if not isinstance(value, list) or not all(isinstance(one, str) for one in value):
        return value
    tokens = tokenize.generate_tokens(io.StringIO(text.strip()).readline)
    return [ast.literal_eval(token.string) for token in tokens if token.type == tokenize.STRING]


def _of_mapping(values: Mapping[str, Any], column: str) -> list[Any]:
    """`{"A": ..., "B": ...}`, or the lists `text` and `label` side by side."""
    letters = list(ascii_uppercase[: len(values)])
    if sorted(values) == letters:
        return [values[letter] for letter in letters]
    texts, labels = values.get("text"), values.get("label")
    if isinstance(texts, list) and labels == list(ascii_uppercase[: len(texts)]):
        return texts
    raise FormatError(f"has an object as {column!r} whose keys are not the letters A, B, ... in their order")
