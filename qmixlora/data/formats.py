"""The formats that people have, brought into one form, which everything below reads.

Understood: LLaVA / Vision-Flan (`image`, `conversations` with `from` / `value`) and chat `messages` whose content is a
string or a list of `{"type": "text" | "image", ...}` parts.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, TypedDict

IMAGE = "<image>"
ROLES = {"human": "user", "user": "user", "gpt": "assistant", "assistant": "assistant", "system": "system"}
TASK_FIELDS = ("task", "task_name")
NO_TASK = "all"  # the task of data that names none


class Turn(TypedDict):
    """One message. `role` is user, assistant or system; `<image>` in the text marks where an image stands."""

    role: str
    text: str


class ImageFile(TypedDict):
    """An image that is not decoded yet: its path, or the file's bytes."""

    path: str | None
    bytes: bytes | None


class Conversation(TypedDict):
    """One sample. There are as many images as `<image>` marks in all turns, in their order."""

    turns: list[Turn]
    images: list[ImageFile]
    task: str


class FormatError(ValueError):
    """A sample in no known format; the message completes "The sample ..."."""


def to_conversation(row: Mapping[str, Any], task_field: str | None = None) -> tuple[list[Turn], list[Any], str]:
    """Bring one sample into the one form: (turns, images as the data names or holds them, task).

    Raises:
        FormatError: neither format, an unknown role, no answer, or images and `<image>` marks that do not match.
    """
    if row.get("conversations") is not None:
        turns, images = _from_llava(row["conversations"])
    elif row.get("messages") is not None:
        turns, images = _from_messages(row["messages"])
    else:
        raise FormatError(f"has neither 'conversations' nor 'messages'; its keys are {sorted(row)}")
    own = row.get("image") if row.get("image") is not None else row.get("images")
    if own is not None:
        images = [*(own if isinstance(own, list) else [own]), *images]
    if not any(turn["role"] == "assistant" and turn["text"] for turn in turns):
        raise FormatError("has no answer to learn from")
    marks = sum(turn["text"].count(IMAGE) for turn in turns)
    if images and not marks:  # the image belongs to the first question
        first = next(turn for turn in turns if turn["role"] == "user")
        first["text"] = IMAGE * len(images) + "\n" + first["text"]
    elif marks != len(images):
        raise FormatError(f"has {marks} {IMAGE} marks and {len(images)} images")
    return turns, images, _task(row, task_field)


def question_about(images: Sequence[ImageFile], question: str, task: str = "") -> Conversation:
    """A conversation of one question about some images, still without an answer."""
    text = f"{IMAGE * len(images)}\n{question}" if images else question
    turns: list[Turn] = [{"role": "user", "text": text}, {"role": "assistant", "text": ""}]
    return {"turns": turns, "images": list(images), "task": task}


def to_messages(turns: Sequence[Turn]) -> list[dict[str, Any]]:
    """Turns as chat-template messages, with content lists."""
    messages = []
    for turn in turns:
        content: list[dict[str, str]] = []
        for index, text in enumerate(turn["text"].split(IMAGE)):
            if index:
                content.append({"type": "image"})
            if text.strip():
                content.append({"type": "text", "text": text.strip()})
        messages.append({"role": turn["role"], "content": content})
    return messages


def _task(row: Mapping[str, Any], task_field: str | None) -> str:
    if task_field is not None and task_field not in row:
        raise FormatError(f"has no field {task_field!r}, which data.task_field names; its keys are {sorted(row)}")
    value = next((row[name] for name in ([task_field] if task_field else TASK_FIELDS) if row.get(name)), NO_TASK)
    return str(value)


def _role(word: Any) -> str:
    if word not in ROLES:
        raise FormatError(f"has the role {word!r}; known are {', '.join(ROLES)}")
    return ROLES[word]


def _from_llava(conversations: Sequence[Mapping[str, Any]]) -> tuple[list[Turn], list[Any]]:
    try:
        return [{"role": _role(turn["from"]), "text": str(turn["value"])} for turn in conversations], []
    except (KeyError, TypeError):
        raise FormatError("has a turn in 'conversations' without 'from' and 'value'") from None


def _from_messages(messages: Sequence[Mapping[str, Any]]) -> tuple[list[Turn], list[Any]]:
    turns: list[Turn] = []
    images: list[Any] = []
    for message in messages:
        if "role" not in message or "content" not in message:
            raise FormatError("has a message without 'role' and 'content'")
        content, text = message["content"], ""
        for part in [{"type": "text", "text": content}] if isinstance(content, str) else content or []:
            if part.get("type") == "text":
                text += str(part.get("text") or "")
            elif part.get("type") in {"image", "image_url"}:
                text += IMAGE
                source = part.get("image") or part.get("path") or part.get("url") or part.get("image_url")
                if source is not None:  # else the sample's own 'image' or 'images' holds it
                    images.append(source)
            else:
                raise FormatError(f"has a content part of type {part.get('type')!r}; known are text and image")
        turns.append({"role": _role(message["role"]), "text": text})
    return turns, images
