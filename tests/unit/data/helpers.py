"""Turns of samples in LLaVA's format, and what a collator makes of them as text."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from datasets import Dataset

from qmixlora.data import IGNORED, Collator, Lengths
from qmixlora.data.checking.survey import Survey
from qmixlora.data.checking.verdicts import verdict_on
from qmixlora.recipe import Data

Write = Callable[[str, Any], Path]
HUMAN = {"from": "human", "value": "<image>\nwhat digit is written ?"}
GPT = {"from": "gpt", "value": "seven"}


def decoded(collator: Collator, batch: dict[str, Any], index: int, key: str) -> str:
    """The tokens of a sample that are supervised (`labels`), or that a mask chooses."""
    ids, mask = batch["input_ids"][index], batch[key][index]
    chosen = ids[mask != IGNORED] if key == "labels" else ids[mask]
    return str(collator.processor.tokenizer.decode(chosen))


def surveyed(rows: Dataset, collator: Collator) -> Survey:
    """The survey of rows that all fit."""
    verdict = verdict_on(rows, Lengths(collator), Data(train="here", max_length=collator.max_length))
    assert verdict.survey is not None and not verdict.refusals.count
    return verdict.survey
