"""Metrics of generated answers."""

from __future__ import annotations

import re


def normalize(answer: str) -> str:
    """Normalise an answer for exact match: case, runs of blanks and closing full stops do not count.

    Normalising twice is normalising once.
    """
    return re.sub(r"\s+", " ", answer).strip().rstrip(" .").casefold()
