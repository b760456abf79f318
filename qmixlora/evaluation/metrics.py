"""Metrics of generated answers."""

from __future__ import annotations

import re


def normalize(answer: str) -> str:
    """Normalise an answer for exact match: case, runs of blanks and a closing full stop do not count."""
    return re.sub(r"\s+", " ", answer).strip().rstrip(".").rstrip().casefold()
