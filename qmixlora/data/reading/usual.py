"""Columns of a table of questions and answers by their usual names."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import takewhile
from string import ascii_lowercase
from typing import Any

from qmixlora.errors import UserError
from qmixlora.recipe import dump_yaml

from .keys import DIALOGUES, SYSTEM_FIELDS, TASK_FIELDS
from .sources import Source
from .texts import is_blank, plain

USUAL: Mapping[str, Sequence[str]] = {  # the first of these that a table has something in
    "question": ("question", "query", "prompt", "instruction", "problem", "input"),
    "answer": ("answer", "answers", "label", "labels", "response", "output", "completion", "target"),
    "image": ("image", "images", "image_path", "image_file", "img", "picture", "file_name", "filename", "img_path"),
    "options": ("options", "choices"),
}
OPTIONS = "option_", "option", "choice_", "choice"  # before letters, or numbers from 1 on: columns of an option each
LETTERED = "", *OPTIONS, "op"
PICTURES = "image_", "image"  # before numbers
BEFORE = (*SYSTEM_FIELDS, "context", "passage", "hint")  # texts above a question
AFTER = ("input",)  # and below it: what an instruction is about

NUMBERS = [str(number) for number in range(1, 27)]
WIDE = 10_000  # characters of a line of YAML


@dataclass(frozen=True)
class Usual:
    """Columns of a table by the keys of `data.columns`; the template of a question that is made of several of them
    (None where it is the usual one); and the columns that have something in them and are not used.
    """

    columns: dict[str, str | list[str]]
    template: str | None
    unused: list[str]


def usual_columns(
    source: str, subset: str | None = None, named: Mapping[str, Any] | None = None, template: str | None = None
) -> Usual | None:
    """The columns of a source's rows that have usual names, in any letters; every row is looked at. None where one is a
    dialogue, or the table has no question or no answer by such a name.

    `named` (columns by their keys) and `template` are settled: no others take their place.

    Raises UserError as `Source.find`.
    """
    rows = (row.value for row in Source.find(source, "train", subset).rows() if not isinstance(row, UserError))
    return _of_rows((row for row in rows if isinstance(row, Mapping)), named or {}, template)


def columns_to_set(row: Mapping[str, Any]) -> str:
    """The end of a sentence: what to set for a table with such a row; empty where its columns have no usual names."""
    usual = _of_rows([row], {}, None)
    if usual is None:
        return ""
    columns = dump_yaml(usual.columns, default_flow_style=True, width=WIDE).strip()
    template = "" if usual.template is None else f" and data.template: {json.dumps(usual.template)}"
    return f"; set data.columns: {columns}{template}"


def _of_rows(rows: Iterable[Mapping[str, Any]], named: Mapping[str, Any], template: str | None) -> Usual | None:
    kinds = dict[str, set[type]]()  # of the values of each column
    for row in rows:
        for name, value in row.items():
            if not is_blank(value):
                kinds.setdefault(str(name), set()).add(type(value))
        if any(row.get(name) is not None for name in DIALOGUES):
            return None
    settled = {one for value in named.values() for one in (value if isinstance(value, list) else [value])}
    names = {plain(name): name for name in kinds if name not in settled}
    found: dict[str, str | list[str]] = {}
    for key, usual in USUAL.items():
        first = next((names[name] for name in usual if name in names), None)
        if first is not None and (key != "options" or kinds[first] & {list, dict, str}):  # else a number of options
            found[key] = first
    lettered, numbered = (_in_series(names, LETTERED, ascii_lowercase, 2), _in_series(names, OPTIONS, NUMBERS, 2))
    if "options" not in found and (options := lettered or numbered):
        found["options"] = options
    if "image" not in found and (pictures := _in_series(names, PICTURES, NUMBERS, 1)):
        found["image"] = pictures
    if not {"question", "answer"} <= {*found, *named}:
        return None
    taken = {name for key, name in found.items() if key not in named and isinstance(name, str)}
    texts = {name for name in names if kinds[names[name]] <= {str, int, float} and names[name] not in taken}
    before, after = ([name for name in group if name in texts] for group in (BEFORE, AFTER))
    found |= {name: names[name] for name in (*before, *after)}
    if template is not None:
        found = {key: name for key, name in found.items() if key in {"answer", "image"} or f"{{{key}}}" in template}
    elif before or after:
        lines = [*before, "question", *after, *(["options"] if "options" in {*found, *named} else [])]
        template = "\n".join(f"{{{name}}}" for name in lines)
    columns = {key: name for key, name in found.items() if key not in named}
    used = {one for value in columns.values() for one in ([value] if isinstance(value, str) else value)}
    return Usual(columns, template, [name for name in kinds if name not in {*used, *settled, *TASK_FIELDS}])


def _in_series(names: Mapping[str, str], prefixes: Sequence[str], ends: Iterable[str], at_least: int) -> list[str]:
    """The columns with one of the prefixes and an end each, in this order, from the first end on without a gap."""
    series = ([names[name] for name in takewhile(names.__contains__, (one + end for end in ends))] for one in prefixes)
    return next((found for found in series if len(found) >= at_least), [])
