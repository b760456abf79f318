"""The one form that rows of all formats are brought into, which everything below reads: conversations."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any, NotRequired, TypedDict

RESERVED = "\ufdd0", "\ufdd1"  # Unicode keeps them for a program's own use; no text that is handed on holds them
IMAGE = "image".join(RESERVED)  # where an image stands: nothing that data can say, as `<image>` is
BESIDE_IMAGES = re.compile(r"\A(?:\s*\n|\s+)")  # between images and the first line of the words behind them
NAMED = 60  # characters of a question that a sample is known by


class Turn(TypedDict):
    """One message. `role` is user, assistant or system; `IMAGE` in the text marks where an image stands."""

    role: str
    text: str


class ImageFile(TypedDict):
    """An image that is not decoded yet: its path, or the file's bytes."""

    path: str | None
    bytes: bytes | None


class Conversation(TypedDict):
    """One sample. There are as many images as `IMAGE` marks in all turns, in their order.

    `task` is that of the last answer. `tasks` are those of all answers where they differ, and `references` all right
    answers to the last question where the data has several; `learned` says of every answer whether it is to be learned,
    where not all are. Else there are none, or no key. `origin` is its place in the data, for messages.
    """

    turns: list[Turn]
    images: list[ImageFile]
    task: str
    tasks: NotRequired[list[str]]
    references: NotRequired[list[str]]
    learned: NotRequired[list[bool]]
    origin: NotRequired[str]


class FormatError(ValueError):
    """A sample that cannot be read; the message completes "The sample ..."."""


def words(text: str) -> str:
    """What a turn's text says, without the marks of its images."""
    return text.replace(IMAGE, "").strip()


def sample_name(row: Mapping[str, Any]) -> str:
    """What errors call a sample: where it comes from, as far as is known, its task and how it begins to ask."""
    asked = next((words(turn["text"]) for turn in row["turns"] if turn["role"] == "user"), "")
    return f"{row.get('origin') or 'a sample'} (task {row['task']}: {' '.join(asked.split())[:NAMED]!r})"


def question_about(images: Sequence[ImageFile], question: str, task: str = "") -> Conversation:
    """A conversation of one question about some images, still without an answer."""
    text = f"{IMAGE * len(images)}\n{question}" if images else question
    turns: list[Turn] = [{"role": "user", "text": text}, {"role": "assistant", "text": ""}]
    return {"turns": turns, "images": list(images), "task": task}


def to_messages(turns: Sequence[Turn]) -> list[dict[str, Any]]:
    """Turns as chat-template messages, with content lists. White space stays as it stands, but for that between images
    before all words and the first line of these, whose indentation stays, and between the last word and images behind
    it.
    """
    messages = []
    for turn in turns:
        texts = turn["text"].split(IMAGE)
        spoken = [index for index, text in enumerate(texts) if text.strip()]
        content: list[dict[str, str]] = []
        for index, text in enumerate(texts):
            if index:
                content.append({"type": "image"})
            if index in spoken:
                if index and index == spoken[0]:
                    text = BESIDE_IMAGES.sub("", text, count=1)
                if index == spoken[-1] < len(texts) - 1:
                    text = text.rstrip()
                content.append({"type": "text", "text": text})
        messages.append({"role": turn["role"], "content": content})
    return messages
