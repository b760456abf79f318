"""The comparisons that other benchmarks ask more of, by name: `--on`."""

from __future__ import annotations

import argparse
from pathlib import Path

from method import EMBEDDED
from real import ON_SMOLLM2

COMPARISONS = {"embedded": EMBEDDED, "real": ON_SMOLLM2}
RESULTS = Path(__file__).parent / "results"
DOCS = Path(__file__).parents[1] / "docs"


def add_on(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--on", choices=tuple(COMPARISONS), default="embedded", help="whose runs")


def suffixed(name: str, on: str) -> str:
    """The name of a folder, file or block of this comparison."""
    return name if on == "embedded" else f"{name}-{on}"


def results_of(question: str, on: str) -> Path:
    """The folder of what is kept."""
    return RESULTS / suffixed(question, on)
