"""Turns as formats say them, before pictures have their places: texts and picture parts of one speaker."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any

from qmixlora.data.formats import IMAGE, FormatError, Turn

from .marks import NAMING, NUMBERED, alone_in, mark_in, named, number
from .texts import is_unseen

OTHER_MEDIA = re.compile("<(video|audio)>")


@dataclass(frozen=True)
class Picture:
    """A picture part of a message; without a source it is one of the row's own pictures: that of its index, or the
    next.
    """

    source: Any = None
    index: int | None = None


@dataclass(frozen=True)
class Spoken:
    """What one speaker says; `role` is user, assistant or system. `task` is an answer's own, if it names one, and
    `is_learned` whether it is to be learned.
    """

    role: str
    parts: list[str | Picture]
    task: str | None = None
    is_learned: bool = True

    @property
    def text(self) -> str:
        """The texts, joined."""
        return "".join(part for part in self.parts if isinstance(part, str))


def pictures_in(fields: Iterable[Any]) -> list[Any]:
    """The pictures of fields, each one or several; texts without one have null, nothing, or one without content."""
    named = [value for value in fields if _is_picture(value)]
    return [picture for value in named for picture in (value if isinstance(value, list) else [value])]


def _is_picture(value: Any) -> bool:
    if isinstance(value, Mapping):
        return any(value.get(key) is not None for key in value)
    return value is not None and value != "" and value != []


def pictures_of(spoken: Sequence[Spoken]) -> list[Any]:
    """The pictures that turns hold themselves, in parts or by their names in the user's words."""
    parts = [part.source for turn in spoken for part in turn.parts if isinstance(part, Picture)]
    marks = [mark for turn in spoken if turn.role == "user" for mark in NAMING.findall(turn.text)]
    return [*(source for source in parts if source is not None), *map(named, marks)]


def check_order(turns: Sequence[Spoken]) -> None:
    """Refuse (FormatError) all but: system or not, then user and assistant in turns, the assistant last."""
    roles = [turn.role for turn in turns]
    if "user" not in roles:
        raise FormatError("has no turn of the user")
    if "assistant" not in roles:
        raise FormatError("has no answer to learn from")
    if "system" in roles[1:]:
        raise FormatError("has a system turn that is not the first turn")
    start = roles[0] == "system"
    if roles[start] == "assistant":
        raise FormatError("starts with an answer, before any question")
    for index, (role, following) in enumerate(pairwise(roles)):
        if role == following:
            raise FormatError(f"has two turns of the {role} in a row, turns {index + 1} and {index + 2}")
    if roles[-1] != "assistant":
        raise FormatError("ends with a question that has no answer")


def with_pictures(spoken: Sequence[Spoken], own: Sequence[Any]) -> tuple[list[Turn], list[Any]]:
    """Turns with `IMAGE` where pictures stand, and the pictures in that order; `own` are those of the row (`placed`).

    Raises:
        FormatError: as `placed`; a picture where the user does not speak, other media in a question, or a question
            without a word or a picture.
    """
    for question in spoken:
        if question.role == "user" and (media := OTHER_MEDIA.search(question.text)):
            raise FormatError(f"has the mark {media[0]} in a question; {media[1]} is not read")
    spoken = placed(spoken, own)
    if any(isinstance(part, Picture) for turn in spoken if turn.role != "user" for part in turn.parts):
        raise FormatError("has a picture in a turn that is not the user's")
    images = [part.source for turn in spoken for part in turn.parts if isinstance(part, Picture)]
    return [_turn(turn) for turn in spoken], images


def placed(spoken: Sequence[Spoken], own: Sequence[Any]) -> list[Spoken]:
    """Turns whose picture parts all have sources, the pictures beside them (of a row, or of a turn) among these.

    Picture parts say where these stand. Without them marks in the user's words do (marks.py), if there are such
    pictures; without marks they come before the first question. Everywhere else marks are text. Words may name
    pictures themselves (`<img>a.png</img>`).

    Raises:
        FormatError: pictures and their places do not match, or a mark asks for a picture that is not there.
    """
    parts = [part for turn in spoken for part in turn.parts if isinstance(part, Picture)]
    questions = [turn.text for turn in spoken if turn.role == "user"]
    naming = next(filter(None, map(NAMING.search, questions)), None)
    if naming and not parts:
        if own:
            raise FormatError(f"has {naming[0]} in a question, and {len(own)} images beside it")
        return _at(NAMING, spoken, lambda mark: Picture(named(mark)))
    if own and not parts:
        spoken = _at_marks(spoken, questions, len(own))
        parts = [part for turn in spoken for part in turn.parts if isinstance(part, Picture)]
    elif mark := alone_in(questions):
        count = sum(question.count(mark) for question in questions)
        raise FormatError(f"has {count} {mark} marks and {len(own)} images" + " in parts of its own" * bool(parts))
    rest = iter(_in_order([part for part in parts if part.source is None], own))

    def sourced(part: str | Picture) -> str | Picture:
        return Picture(next(rest)) if isinstance(part, Picture) and part.source is None else part

    return [replace(turn, parts=[sourced(part) for part in turn.parts]) for turn in spoken]


def _at_marks(spoken: Sequence[Spoken], questions: Sequence[str], images: int) -> list[Spoken]:
    """The user's turns with picture parts for the marks in their words, or before all else in the first question."""
    if not questions:
        raise FormatError("has a picture in a turn that is not the user's")
    mark = mark_in(questions)
    if count := sum(question.count(mark) for question in questions):
        if count != images:
            raise FormatError(f"has {count} {mark} marks and {images} images")
        return _at(re.compile(f"({re.escape(mark)})"), spoken, lambda _: Picture())
    if numbered := [mark for question in questions for mark in NUMBERED.findall(question)]:
        if {*map(number, numbered)} != {*range(1, images + 1)}:
            raise FormatError(f"has the marks {', '.join(dict.fromkeys(numbered))} and {images} images")
        shown = set[int]()

        def at_first(mark: str) -> str | Picture:
            if number(mark) in shown:
                return mark
            shown.add(number(mark))
            return Picture(index=number(mark) - 1)

        return _at(NUMBERED, spoken, at_first)
    first = next(turn for turn in spoken if turn.role == "user")
    below = ["\n", *first.parts] if first.text.strip() else []
    above = [Picture() for _ in range(images)]
    return [replace(turn, parts=[*above, *below]) if turn is first else turn for turn in spoken]


def _at(mark: re.Pattern[str], spoken: Sequence[Spoken], part: Callable[[str], str | Picture]) -> list[Spoken]:
    """Turns with parts in place of the marks in the user's words; `mark` is one group, which is split at."""

    def split(text: str) -> list[str | Picture]:
        return [part(piece) if at % 2 else piece for at, piece in enumerate(mark.split(text))]

    return [replace(turn, parts=split(turn.text)) if turn.role == "user" else turn for turn in spoken]


def _in_order(places: Sequence[Picture], own: Sequence[Any]) -> list[Any]:
    """The pictures of parts without a source: one after the other, or by the numbers that the parts give."""
    if len(places) != len(own):
        raise FormatError(f"has {len(places)} picture parts without a source, and {len(own)} images")
    numbers = [place.index for place in places]
    if all(number is None for number in numbers):
        return list(own)
    if set(numbers) != {*range(len(own))}:
        told = ", ".join("none" if number is None else str(number) for number in numbers)
        raise FormatError(f"has picture parts with the indices {told}, and {len(own)} images, which count from 0")
    return [own[number] for number in numbers if number is not None]


def _turn(turn: Spoken) -> Turn:
    text = "".join(part if isinstance(part, str) else IMAGE for part in turn.parts)
    if is_unseen(text):
        raise FormatError(f"has a blank {'answer' if turn.role == 'assistant' else 'question'}")
    return {"role": turn.role, "text": text}
