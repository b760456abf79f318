"""A row of any format to a sample in the one form.

Understood: `conversations` and `messages` (dialogues.py), and plain columns that the recipe names (columns.py).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

from qmixlora.data.formats import IMAGE, FormatError, Turn
from qmixlora.recipe import Columns

from .columns import named, spoken_in_columns
from .dialogues import LEARNED, UNLEARNED, own_images, refuse_other_media, spoken_in
from .keys import DIALOGUES, SYSTEM_FIELDS, TASK_FIELDS
from .spoken import Spoken, check_order, pictures_in, pictures_of, with_pictures
from .texts import as_text, is_blank, is_unseen, kind, written
from .unread import unread_pictures

TOOL_FIELDS = ("tools", "functions")
EARLIER = "history"  # a list of turns
VERDICTS = ("label", "kto_tag")  # on a row: false for one that shows what not to answer
NOT_LEARNED = ("0", "0.0", "false")  # in small letters: tables of text hold them so
NO_TASK = "all"  # the task of data that names none


class NoDialogueError(FormatError):
    """A row of plain columns, of which the recipe names none."""


@dataclass(frozen=True)
class Reading:
    """How a recipe wants a source to be read: the keys of `data` with the same names."""

    task_field: str | None = None
    columns: Columns | None = None
    template: str = ""
    subset: str | None = None

    @property
    def form(self) -> str:
        """What rows are read as: dialogue or table."""
        return "dialogue" if self.columns is None else "table"


class Sample(NamedTuple):
    """A row in the one form, its images as the data names or holds them (a text, or a mapping). `task` is that of the
    last answer; `tasks` are those of all answers, where they differ, and `learned` whether each is to be learned, where
    not all are. `unread` are keys with pictures that are not among the images.
    """

    turns: list[Turn]
    images: list[Any]
    task: str
    references: list[str]
    tasks: list[str]
    learned: list[bool]
    unread: list[str]


def to_sample(row: Mapping[str, Any], reading: Reading) -> Sample:
    """Bring one row into the one form. Raises FormatError for one that has not one meaning."""
    refuse_other_media(row)
    dialogue, named_in_recipe = _dialogue_of(row) if reading.columns is None else "", _named(reading)
    beside = {key: value for key, value in row.items() if key not in named_in_recipe}
    _refuse_other_lessons(beside)
    if reading.columns is not None:
        names = [reading.columns.image] if isinstance(reading.columns.image, str) else reading.columns.image or []
        own, holders = pictures_in(row.get(name) for name in names), [beside]
        spoken, references = spoken_in_columns(row, reading.columns, reading.template, len(own))
    else:
        own, spoken, references = own_images(row), spoken_in(row[dialogue], dialogue), []
        holders = [beside, *row[dialogue]]
        spoken = _instructed(spoken, row)
    unread = unread_pictures(holders, [*own, *pictures_of(spoken)], reading.form)
    check_order(spoken)
    turns, images = with_pictures(spoken, own)
    tasks = _tasks(row, reading, [turn.task for turn in spoken if turn.role == "assistant"])
    learned = [turn.is_learned for turn in spoken if turn.role == "assistant"]
    if not any(learned):
        raise FormatError("has no answer that is to be learned")
    while not learned.pop():  # what comes after the last one that is learned teaches nothing
        turns, tasks = turns[:-2], tasks[:-1]
    shown = sum(turn["text"].count(IMAGE) for turn in turns)
    return Sample(
        turns,
        [_image(image) for image in images[:shown]],
        tasks[-1],
        references,
        tasks if len(set(tasks)) > 1 else [],
        [] if all(learned) else [*learned, True],
        unread,
    )


def _dialogue_of(row: Mapping[str, Any]) -> str:
    """The key of a row's dialogue."""
    names = [name for name in DIALOGUES if row.get(name) is not None]
    if len(names) > 1:
        raise FormatError("has both 'conversations' and 'messages'")
    if names:
        return names[0]
    keys = sorted(map(str, row))
    raise NoDialogueError(
        f"has neither 'conversations' nor 'messages', and data.columns is not set; its keys are {keys}"
    )


def _instructed(spoken: list[Spoken], row: Mapping[str, Any]) -> list[Spoken]:
    """A dialogue, begun with the system's words that the row has beside it."""
    named = [name for name in SYSTEM_FIELDS if not is_blank(row.get(name))]
    if not named:
        return spoken
    words = as_text(row[named[0]], repr(named[0]))
    if len(named) > 1 or any(turn.role == "system" and turn.text != words for turn in spoken):
        raise FormatError(f"has {' and '.join(map(repr, named))}" + " and a system turn" * (len(named) == 1))
    return spoken if spoken[0].role == "system" else [Spoken("system", [words]), *spoken]


def _named(reading: Reading) -> set[str | None]:
    """The columns that a recipe names, and so says what is in them."""
    return {reading.task_field, *(() if reading.columns is None else named(reading.columns))}


def _refuse_other_lessons(beside: Mapping[str, Any]) -> None:
    """Refuse (FormatError) a row that teaches something else than its answers, or has turns elsewhere, by what it has
    beside what is read.
    """
    for key in TOOL_FIELDS:
        if not is_blank(beside.get(key)) and beside[key] != "[]":
            raise FormatError(f"has {key!r}; calls of tools are not learned")
    for key in (*VERDICTS, *LEARNED, *UNLEARNED):
        told = str(beside[key]).lower() if key in beside else ""
        if beside.get(key) is False or (key not in VERDICTS and told in NOT_LEARNED):
            raise FormatError(f"has {key!r}: {told}, so that its answers are not to be learned; leave the row out")
    if isinstance(beside.get(EARLIER), list) and beside[EARLIER]:
        raise FormatError(
            f"has {EARLIER!r}, which is not read; put its turns before the others in 'messages', or remove it"
        )


def _image(image: Any) -> Any:
    """An image as a text (path, address) or a mapping that has one, or a file's bytes."""
    if isinstance(image, str):
        return written(image, "an image")
    if isinstance(image, bytes):  # a column of files
        image = {"bytes": image, "path": None}
    if isinstance(image, Mapping):
        if isinstance(image.get("bytes"), bytes) and image["bytes"]:
            return image
        path = image.get("path") or image.get("url")
        if isinstance(path, str) and image.get("bytes") in (None, b""):
            return written(path, "an image")
        raise FormatError("has an image that is an object without 'bytes', 'path' or 'url'")
    raise FormatError(f"has {kind(image)} as an image")


def _tasks(row: Mapping[str, Any], reading: Reading, own: list[str | None]) -> list[str]:
    """The task of every answer: its `own`, or else the row's, which may be a list of one for each."""
    value, what = _task_of_row(row, reading)
    if isinstance(value, list):
        if any(own):
            raise FormatError(f"has a list as {what}, and answers that name their own")
        if len(value) != len(own):
            raise FormatError(f"has {len(value)} tasks in {what} and {len(own)} answers")
        return [written(task, what).strip() for task in value]
    if value is None and any(own) and not all(own):
        raise FormatError("has answers with a task and answers without, and no task of its own for these")
    of_row = NO_TASK if value is None else written(value, what).strip()
    return [task or of_row for task in own]


def _task_of_row(row: Mapping[str, Any], reading: Reading) -> tuple[Any, str]:
    """(the task that a row names, None where it names none; what it is called)."""
    field = reading.task_field or (reading.columns.task if reading.columns is not None else None)
    if field is not None:
        if field not in row:
            name = "data.task_field" if reading.task_field else "data.columns"
            raise FormatError(f"has no field {field!r}, which {name} names; its keys are {sorted(map(str, row))}")
        what = f"the task in {field!r}"
        return row[field] if isinstance(row[field], list) else written(row[field], what), what
    for name in TASK_FIELDS:
        what, value = f"the task in {name!r}", row.get(name)
        if isinstance(value, list) or (value is not None and not is_unseen(as_text(value, what))):
            return value, what
    return None, ""
