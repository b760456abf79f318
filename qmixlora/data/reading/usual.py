"""Columns of a table of questions and answers by their usual names."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from qmixlora.errors import UserError
from qmixlora.recipe import Columns

from .rows import DIALOGUES
from .sources import Source

USUAL: Mapping[str, Sequence[str]] = {  # the first of these that a table has
    "question": ("question", "query", "prompt", "instruction", "problem", "input"),
    "answer": ("answer", "answers", "label", "labels", "response", "output", "completion", "target"),
    "image": ("image", "images", "image_path", "image_file", "img", "picture", "file_name", "filename", "img_path"),
    "options": ("options", "choices"),
}


def usual_columns(source: str, subset: str | None = None) -> Columns | None:
    """The columns of a source's rows that have usual names, in any letters; None where its first row is a dialogue, or
    has no question or no answer by such a name.

    Raises UserError as `Source.find`.
    """
    row = next((row for row in Source.find(source, "train", subset).rows() if not isinstance(row, UserError)), None)
    return None if row is None or not isinstance(row.value, Mapping) else _of_row(row.value)


def _of_row(row: Mapping[str, Any]) -> Columns | None:
    if any(row.get(name) is not None for name in DIALOGUES):
        return None
    names = {str(name).lower().replace(" ", "_").replace("-", "_"): str(name) for name in row}
    found = {key: next((names[name] for name in usual if name in names), None) for key, usual in USUAL.items()}
    if found["question"] is None or found["answer"] is None:
        return None
    if not (options := row.get(found["options"] or "")) or not isinstance(options, list | dict | str):
        found["options"] = None  # a number of options, or none in the first row
    return Columns.model_validate({key: name for key, name in found.items() if name is not None})
