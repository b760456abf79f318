"""Marks in a question's words for the places of its pictures, as data for one model or another writes them."""

from __future__ import annotations

import re
from collections.abc import Iterable

MARK = "<image>"  # LLaVA's
MARKS = (  # and what data for other models writes for it
    MARK,
    "<|vision_start|><|image_pad|><|vision_end|>",
    "<|image_pad|>",
    "<|image|>",
    "<start_of_image>",
    "<image_placeholder>",
    "<ImageHere>",
    "[IMG]",
)
NUMBERED = re.compile(r"(<\|?image[ _-]?[1-9]\d?\|?>)")  # of the first, second, ... one: MMMU's, Phi-3.5's
NAMING = re.compile(r"(<img>[^<>\n]+</img>)")  # a path or an address within the words: Qwen-VL's
EVERY = "|".join((*map(re.escape, MARKS), NUMBERED.pattern[1:-1]))
ALONE = re.compile(rf"^\s*(?:{EVERY})|(?:{EVERY})\s*$|^[^\S\n]*(?:{EVERY})[^\S\n]*$", re.MULTILINE)


def mark_in(texts: Iterable[str]) -> str:
    """The mark that texts hold: the first of `MARKS` that there is; `MARK` without any."""
    texts = list(texts)
    return next((mark for mark in MARKS if any(mark in text for text in texts)), MARK)


def alone_in(texts: Iterable[str]) -> str | None:
    """A mark, if there is one, that begins or ends a text or has a line of its own, and so asks for a picture."""
    found = next(filter(None, map(ALONE.search, texts)), None)
    return found and found[0].strip()


def number(mark: str) -> int:
    """The number of a numbered mark."""
    return int("".join(filter(str.isdigit, mark)))


def named(mark: str) -> str:
    """The path or address that a naming mark holds."""
    return mark.removeprefix("<img>").removesuffix("</img>").strip()
