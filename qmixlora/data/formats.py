"""The formats people have, to the one form that everything below reads.

A conversation is `{"turns": [{"role", "text"}], "images": [...], "task": str}`; `<image>` in a text marks where a
picture stands. Understood: LLaVA / Vision-Flan (`image`, `conversations` with `from` / `value`) and chat `messages`
whose content is a string or a list of `{"type": "text" | "image", ...}` parts.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

IMAGE = "<image>"
ROLES = {"human": "user", "user": "user", "gpt": "assistant", "assistant": "assistant", "system": "system"}
TASK_FIELDS = ("task", "task_name")
NO_TASK = "all"  # the task of data that names none


class FormatError(ValueError):
    """One sample is not in a format we know; the message says what is wrong with it."""


def to_conversation(row: Mapping[str, Any], task_field: str | None = None) -> dict[str, Any]:
    """Bring one sample into the one form.

    Returns `turns`, `images` (file names, or whatever the data set holds) and `task`.

    Raises:
        FormatError: neither format, an unknown role, no answer, or pictures and `<image>` marks that do not match.
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
    if images and not marks:  # the picture belongs to the first question
        first = next(turn for turn in turns if turn["role"] == "user")
        first["text"] = IMAGE * len(images) + "\n" + first["text"]
    elif marks != len(images):
        raise FormatError(f"has {marks} {IMAGE} marks and {len(images)} images")
    return {"turns": turns, "images": images, "task": _task(row, task_field)}


def _task(row: Mapping[str, Any], task_field: str | None) -> str:
    if task_field is not None and task_field not in row:
        raise FormatError(f"has no field {task_field!r}, which data.task_field names; its keys are {sorted(row)}")
    value = next((row[name] for name in ([task_field] if task_field else TASK_FIELDS) if row.get(name)), NO_TASK)
    return str(value)


def _role(word: Any) -> str:
    if word not in ROLES:
        raise FormatError(f"has the role {word!r}; known are {', '.join(ROLES)}")
    return ROLES[word]


def _from_llava(conversations: Sequence[Mapping[str, Any]]) -> tuple[list[dict[str, str]], list[Any]]:
    try:
        return [{"role": _role(turn["from"]), "text": str(turn["value"])} for turn in conversations], []
    except (KeyError, TypeError):
        raise FormatError("has a turn in 'conversations' without 'from' and 'value'") from None


def _from_messages(messages: Sequence[Mapping[str, Any]]) -> tuple[list[dict[str, str]], list[Any]]:
    turns, images = [], []
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


def to_messages(turns: Sequence[Mapping[str, str]]) -> list[dict[str, Any]]:
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
