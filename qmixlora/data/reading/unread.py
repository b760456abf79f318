"""Pictures that rows hold under keys that are not read: they would be learned blind, or without one of them.

A picture is known by its value, whatever its key; by the key where the value does not say what it is (`photo: 00471`).
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from functools import lru_cache
from itertools import islice
from mimetypes import guess_type
from typing import Any

from qmixlora.data.formats import FormatError

from .keys import DIALOGUES, IMAGE_FIELDS, KEYS, SYSTEM_FIELDS, TASK_FIELDS
from .spoken import pictures_in
from .texts import is_blank, plain

# what is read as words, and where a row is from
NO_PICTURES = {*DIALOGUES, *(key for pair in KEYS for key in pair), *SYSTEM_FIELDS, *TASK_FIELDS, "id", "source"}
NAMES = re.compile(
    r"(image|img|picture|photo)s?(_?(path|file|name|file_?name|url|uri|bytes|base64))?s?(?P<number>_?\d+)?"
)
SIGNATURE = re.compile(rb"\x89PNG|\xff\xd8\xff|GIF8|BM.{4}\0{4}|II\*\0|MM\0\*|RIFF.{4}WEBP", re.DOTALL)
INLINE = "data:image/"
DEEPEST = 3  # containers around a picture: metadata: {images: [{path: ...}]}
LOOKED_AT = 16  # items of a list, which may be a vector
LONGEST = 4096  # characters of a path
FIXES = {
    "dialogue": "name it in 'image' (several: a list in 'images'), or remove that key",
    "table": "name it in data.columns.image (several: a list of columns), or remove that column",
}


def unread_pictures(holders: Iterable[Mapping[str, Any]], read: Sequence[Any], form: str) -> list[str]:
    """The keys of a row and its turns that hold other pictures than those that are read, as far as their files' names
    tell. `form` is that of the row, dialogue or table.

    Raises:
        FormatError: there is such a key and no picture is read; or it says that it holds a further one (`image_2`).
    """
    told = []
    for holder in holders:
        for key, value in holder.items():
            if key in NO_PICTURES or (key in IMAGE_FIELDS and form == "dialogue") or not _may_hold(value):
                continue
            held, named = _held(value), _named(str(key))
            if not held and named is None:
                continue
            is_further = key in IMAGE_FIELDS or (named is not None and named["number"] is not None)
            if not read or (is_further and any(one not in read for one in pictures_in([value]))):
                raise FormatError(f"has a picture in {key!r}, which is not read; {FIXES[form]}")
            if _are_others(held, read):
                told.append(str(key))
    return told


def told_of(unread: Mapping[str, int], form: str) -> list[str]:
    """What to say of such keys, each of so many samples."""
    return [
        f"{count} samples hold a picture in {key!r} whose name is none of those that are read, and are learned without "
        f"it: if it is another one, {FIXES[form]}."
        for key, count in unread.items()
    ]


def _may_hold(value: Any) -> bool:  # others are a number of pictures, or say whether there are any
    return isinstance(value, (str, bytes, list, Mapping)) and not is_blank(value)


@lru_cache  # the same few in all rows
def _named(key: str) -> re.Match[str] | None:
    return NAMES.fullmatch(plain(key))


def _held(value: Any, depth: int = 0) -> set[str]:
    """The pictures in a value: their files' names without endings, nothing for one that has no name."""
    if isinstance(value, str):
        return {_stem(value)} if _is_picture(value) else set()
    if isinstance(value, bytes):
        return {""} if SIGNATURE.match(value) else set()
    if depth == DEEPEST or not isinstance(value, (list, Mapping)):
        return set()
    inside = value.values() if isinstance(value, Mapping) else islice(value, LOOKED_AT)
    return {name for one in inside for name in _held(one, depth + 1)}


def _are_others(held: set[str], read: Sequence[Any]) -> bool:
    """Whether pictures are others than those that are read; names say nothing where one of these has none."""
    names, known = held - {""}, set[str]()
    for picture in read:
        known |= ({_stem(picture)} if isinstance(picture, str) else _held(picture) - {""}) or {""}
    if names and names <= known:
        return False
    return "" in held or (bool(names) and "" not in known)


def _is_picture(text: str) -> bool:
    if text.startswith(INLINE):
        return True
    _, dot, ending = _path(text)[-6:].rpartition(".")
    return bool(dot) and len(text) <= LONGEST and "\n" not in text and _is_ending(ending)


@lru_cache
def _is_ending(ending: str) -> bool:
    return (guess_type(f"a.{ending}", strict=False)[0] or "").startswith("image/")


def _stem(text: str) -> str:
    """The name of a picture's file, without folders and ending: copies of one picture may have several."""
    return "" if text.startswith(INLINE) else _path(text).replace("\\", "/").rpartition("/")[2].rpartition(".")[0]


def _path(text: str) -> str:
    return text.partition("?")[0] if "://" in text else text
