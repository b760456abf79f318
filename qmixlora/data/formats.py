"""The one form that rows of all formats are brought into, which everything below reads: conversations."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NotRequired, TypedDict

RESERVED = "\ufdd0", "\ufdd1"  # Unicode keeps them for a program's own use; no text that is handed on holds them
IMAGE = "image".join(RESERVED)  # where an image stands: nothing that data can say, as `<image>` is


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
    answers to the last question where the data has several; else there are none, or no key. `origin` is its place in
    the data, for messages.
    """

    turns: list[Turn]
    images: list[ImageFile]
    task: str
    tasks: NotRequired[list[str]]
    references: NotRequired[list[str]]
    origin: NotRequired[str]


class FormatError(ValueError):
    """A sample that cannot be read; the message completes "The sample ..."."""


def question_about(images: Sequence[ImageFile], question: str, task: str = "") -> Conversation:
    """A conversation of one question about some images, still without an answer."""
    text = f"{IMAGE * len(images)}\n{question}" if images else question
    turns: list[Turn] = [{"role": "user", "text": text}, {"role": "assistant", "text": ""}]
    return {"turns": turns, "images": list(images), "task": task}


def to_messages(turns: Sequence[Turn]) -> list[dict[str, Any]]:
    """Turns as chat-template messages, with content lists. White space stays where it stands between words, an image
    among them or not; at both ends of a turn it is taken off, as it is between its first or last word and the images
    before or behind it.
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
                text = text.lstrip() if index == spoken[0] else text
                text = text.rstrip() if index == spoken[-1] else text
                content.append({"type": "text", "text": text})
        messages.append({"role": turn["role"], "content": content})
    return messages
