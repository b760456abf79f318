"""Values of a row that are read as text: words and finite numbers, nothing else."""

from __future__ import annotations

import math
from collections.abc import Mapping
from functools import lru_cache
from typing import Any
from unicodedata import category

from qmixlora.data.formats import RESERVED, FormatError


def as_text(value: Any, what: str) -> str:
    """A value as text, white space as it stands; a finite number as Python writes it (`3`, `0.5`).

    Raises:
        FormatError: anything else, or text that cannot be written as UTF-8; `what` is what the value stands for.
    """
    if isinstance(value, str):
        if not value.isascii():
            _check_characters(value, what)
        return value
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        raise FormatError(f"has {kind(value)} as {what}")
    return str(value)


def written(value: Any, what: str) -> str:
    """The same, and not blank."""
    text = as_text(value, what)
    if is_unseen(text):
        raise FormatError(f"has nothing but white space as {what}" if text else f"has nothing as {what}")
    return text


def is_blank(value: Any) -> bool:
    """Whether a value is none: null, white space, an empty list, or an object of such (a picture without content)."""
    if isinstance(value, Mapping):
        return all(is_blank(one) for one in value.values())
    return value is None or (isinstance(value, str) and is_unseen(value)) or value in ([], b"")


def is_unseen(text: str) -> bool:
    """Whether a text has nothing but white space and characters that are not seen (U+200B and others that format)."""
    return not text.strip() or (not text.isascii() and all(one.isspace() or category(one) == "Cf" for one in text))


def kind(value: Any) -> str:
    """What a value is, in the words of JSON."""
    if value is None:
        return "null"
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, str):
        return "a text"
    if isinstance(value, float) and not math.isfinite(value):
        return "NaN" if math.isnan(value) else "Infinity"
    if isinstance(value, int | float):
        return "a number"
    if isinstance(value, list | tuple):
        return "a list"
    return "an object" if isinstance(value, Mapping) else f"a value of type {type(value).__name__}"


@lru_cache  # the same few in all rows
def plain(key: str) -> str:
    """A key in small letters, with `_` between its words."""
    return key.lower().replace(" ", "_").replace("-", "_")


def _check_characters(text: str, what: str) -> None:
    if any(character in text for character in RESERVED):
        raise FormatError(f"has one of the characters U+FDD0 and U+FDD1 in {what}, which no text may hold")
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise FormatError(f"has half a character, {text[error.start]!r}, in {what}") from None
