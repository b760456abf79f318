"""Turns as formats say them, before pictures have their places: texts and picture parts of one speaker."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

from qmixlora.data.formats import IMAGE, FormatError, Turn

MARK = "<image>"  # LLaVA's word for the place of a picture
ALONE = re.compile(rf"^\s*{MARK}|{MARK}\s*$|^[^\S\n]*{MARK}[^\S\n]*$", re.MULTILINE)
OTHER_MEDIA = re.compile("<(video|audio)>")


@dataclass(frozen=True)
class Picture:
    """A picture part of a message; without a source it is the next of the row's own pictures."""

    source: Any = None


@dataclass(frozen=True)
class Spoken:
    """What one speaker says; `role` is user, assistant or system. `task` is an answer's own, if it names one."""

    role: str
    parts: list[str | Picture]
    task: str | None = None

    @property
    def text(self) -> str:
        """The texts, joined."""
        return "".join(part for part in self.parts if isinstance(part, str))


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
    """Turns with `IMAGE` where pictures stand, and the pictures in that order.

    Picture parts say where they stand. Without them the user's `<image>` marks do, if the row has pictures of its
    own; without marks these come before the first question. Everywhere else `<image>` is text.

    Raises:
        FormatError: pictures and their places do not match, a place where the user does not speak, a mark that asks
            for a picture that the row does not have, other media, or a question without a word or a picture.
    """
    parts = [part for turn in spoken for part in turn.parts if isinstance(part, Picture)]
    questions = [turn for turn in spoken if turn.role == "user"]
    for question in questions:
        if media := OTHER_MEDIA.search(question.text):
            raise FormatError(f"has the mark {media[0]} in a question; {media[1]} is not read")
    if not parts and own:
        marks = sum(question.text.count(MARK) for question in questions)
        if marks not in {0, len(own)}:
            raise FormatError(f"has {marks} {MARK} marks and {len(own)} images")
        spoken = [_marked(turn, first=not marks and turn is questions[0], own=own) for turn in spoken]
        return [_turn(turn) for turn in spoken], list(own)
    if any(ALONE.search(question.text) for question in questions):
        marks = sum(question.text.count(MARK) for question in questions)
        raise FormatError(f"has {marks} {MARK} marks and {len(own)} images" + " in parts of its own" * bool(parts))
    if any(isinstance(part, Picture) for turn in spoken if turn.role != "user" for part in turn.parts):
        raise FormatError("has a picture in a turn that is not the user's")
    places = sum(part.source is None for part in parts)
    if places != len(own):
        raise FormatError(f"has {places} picture parts without a source, and {len(own)} images")
    rest = iter(own)
    images = [next(rest) if part.source is None else part.source for part in parts]
    return [_turn(turn) for turn in spoken], images


def _marked(turn: Spoken, first: bool, own: Sequence[Any]) -> Spoken:
    """The user's turn with pictures for marks, or before all else in the first question."""
    if first:
        below = ["\n", *turn.parts] if turn.text.strip() else []
        return Spoken(turn.role, [*(Picture() for _ in own), *below])
    if turn.role != "user" or MARK not in turn.text:
        return turn
    before, *rest = turn.text.split(MARK)
    parts: list[str | Picture] = [before]
    for text in rest:
        parts += [Picture(), text]
    return Spoken(turn.role, parts)


def _turn(turn: Spoken) -> Turn:
    text = "".join(part if isinstance(part, str) else IMAGE for part in turn.parts)
    if not text.strip():
        raise FormatError(f"has a blank {'answer' if turn.role == 'assistant' else 'question'}")
    return {"role": turn.role, "text": text}
