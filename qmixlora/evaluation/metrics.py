"""Metrics of generated answers."""

from __future__ import annotations

import re


def normalize(answer: str) -> str:
    """Reduce an answer to what exact match compares: case, runs of blanks and a closing full stop do not count."""
    return re.sub(r"\s+", " ", answer).strip().rstrip(".").rstrip().casefold()
