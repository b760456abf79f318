"""Dialogues to turns: LLaVA, Vision-Flan and ShareGPT `conversations`, chat `messages`."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from qmixlora.data.formats import FormatError

from .keys import IMAGE_FIELDS, KEYS
from .spoken import Picture, Spoken, pictures_in, placed
from .texts import as_text, is_blank, kind, written

ROLES = {
    **dict.fromkeys(("user", "human"), "user"),
    **dict.fromkeys(("assistant", "gpt", "chatgpt", "model", "bot"), "assistant"),
    "system": "system",
}
TOOLS = {"tool", "function", "function_call", "tool_call", "tool_calls", "observation", "ipython"}
SOURCES = ("image", "path", "url", "image_url")
MEDIA = ("video", "audio")
LEARNED = ("weight", "loss", "loss_scale", "train", "train_detail")  # of an answer: how much of it peers learn
UNLEARNED = ("loss_mask", "loss_weight", "trainable", "training", "train_on_turn")  # the same, by names not read
THOUGHTS = ("reasoning_content", "thinking")  # what some generate before an answer
MEDIUM_OF = {key: medium for medium in MEDIA for key in (medium, f"{medium}s")}


def spoken_in(dialogue: Any, name: str) -> list[Spoken]:
    """The turns of a dialogue, in either pair of keys; blank system turns are left out.

    Raises:
        FormatError: not a list of turns, unknown speakers, calls of tools, video or audio, values that are no text.
    """
    if not isinstance(dialogue, list) or not dialogue:
        what = "an empty list" if isinstance(dialogue, list) else kind(dialogue)
        raise FormatError(f"has {what} as {name!r}, not a list of turns")
    turns = [_spoken(turn, name) for turn in dialogue]
    return [turn for turn in turns if turn.role != "system" or turn.parts != [turn.text] or turn.text.strip()]


def refuse_other_media(holder: Mapping[str, Any]) -> None:
    """Refuse (FormatError) a row or a turn that holds video or audio, whatever its key says of their number."""
    for key, medium in MEDIUM_OF.items():
        if holder.get(key):
            raise FormatError(f"has {key!r}; {medium} is not read")


def own_images(holder: Mapping[str, Any]) -> list[Any]:
    """The pictures that a row or a turn names beside its text. Raises FormatError where two keys do."""
    fields = [holder.get(name) for name in IMAGE_FIELDS]
    if all(pictures_in([value]) for value in fields):
        raise FormatError("has both 'image' and 'images'")
    return pictures_in(fields)


def _spoken(turn: Any, name: str) -> Spoken:
    if not isinstance(turn, Mapping):
        raise FormatError(f"has {kind(turn)} as a turn in {name!r}")
    for key in ("tool_calls", "function_call"):
        if turn.get(key):
            raise FormatError(f"has {key!r}; calls of tools are not learned")
    refuse_other_media(turn)
    # a table of rows with either pair has all keys in every row, and null where one is not meant
    pairs = [pair for pair in KEYS if pair[0] in turn and pair[1] in turn]
    meant = [pair for pair in pairs if any(turn[key] is not None for key in pair)] or pairs
    if len(meant) != 1:
        keys = "with both 'from', 'value' and" if meant else "without 'from' and 'value' or"
        raise FormatError(f"has a turn in {name!r} {keys} 'role' and 'content'")
    speaker, content = (turn[key] for key in meant[0])
    role = _role(speaker)
    what = {"assistant": "an answer", "user": "a question", "system": "a system turn"}[role]
    task = _task_of(turn, role)
    is_learned = role != "assistant" or _is_learned(turn)
    parts: list[str | Picture]
    parts = [_part(part, what) for part in content] if isinstance(content, list) else [as_text(content, what)]
    spoken, own = Spoken(role, parts, task, is_learned), own_images(turn)
    return placed([spoken], own)[0] if own else spoken


def _is_learned(answer: Mapping[str, Any]) -> bool:
    """Whether an answer is to be learned. Raises FormatError for one that is to be learned in part, or otherwise than
    it stands, or that says it by a key that is not read.
    """
    unread = [key for key in UNLEARNED if not is_blank(value := answer.get(key)) and value != 1]
    if isinstance(answer.get("mask"), int):  # 1 and true may as well be of what is learned as of what is hidden
        unread.append("mask")
    if unread:
        raise FormatError(
            f"has an answer with {unread[0]!r}, which is not read; write 'weight': 0 there if it is not to be learned, "
            "else 1"
        )
    said = {key: value for key in LEARNED if not is_blank(value := answer.get(key))}
    for key, value in said.items():
        if not isinstance(value, bool | int | float) or value not in (0, 1):
            told = json.dumps(value) if isinstance(value, int | float) else kind(value)
            raise FormatError(
                f"has an answer with {key!r}: {told}, but an answer is learned whole (1, true) or not at all (0, false)"
            )
    if len(set(map(bool, said.values()))) > 1:
        raise FormatError(f"has an answer that is to be learned and not, by {' and '.join(map(repr, said))}")
    for key in THOUGHTS:
        if not is_blank(answer.get(key)):
            raise FormatError(f"has an answer with {key!r}; write into the answer what is to be learned, or remove it")
    return all(said.values())


def _task_of(turn: Mapping[str, Any], role: str) -> str | None:
    """The task that an answer names, if it does."""
    if turn.get("task") is None:
        return None
    if role != "assistant":
        raise FormatError(f"has a task in a turn of the {role}; each answer may name its own")
    return written(turn["task"], "the task of an answer").strip()


def _role(word: Any) -> str:
    if not isinstance(word, str):
        raise FormatError(f"has {kind(word)} as a role")
    role = word.strip().lower()
    if role in TOOLS:
        raise FormatError(f"has a turn of the role {word!r}; calls of tools are not learned")
    if role not in ROLES:
        raise FormatError(f"has the role {word!r}; known are {', '.join(ROLES)}")
    return ROLES[role]


def _index_of(part: Mapping[str, Any]) -> int | None:
    """Which of the row's pictures a part shows, if it says so."""
    index = part.get("index")
    if index is not None and (isinstance(index, bool) or not isinstance(index, int)):
        raise FormatError(f"has {kind(index)} as the index of a picture part")
    return index


def _part(part: Any, what: str) -> str | Picture:
    """A part of a message's content: its text, or a picture."""
    if not isinstance(part, Mapping):
        raise FormatError(f"has {kind(part)} as a part of {what}")
    form = part.get("type")
    if form == "text":
        return as_text(part.get("text"), f"a part of {what}")
    if form in ("image", "image_url"):
        keys = [key for key in SOURCES if part.get(key) is not None]
        if len(keys) > 1:
            raise FormatError(f"has a picture part with several sources, {', '.join(keys)}")
        source = part[keys[0]] if keys else None
        if form == "image_url" and isinstance(source, Mapping) and "bytes" not in source:
            source = source.get("url")
        if form == "image_url" and source is None:
            raise FormatError("has a part of type 'image_url' without a url")
        return Picture(source, _index_of(part))
    medium = next((medium for medium in MEDIA if isinstance(form, str) and medium in form), None)
    if medium:
        raise FormatError(f"has a content part of type {form!r}; {medium} is not read")
    raise FormatError(f"has a content part of type {form!r}; known are text, image and image_url")
