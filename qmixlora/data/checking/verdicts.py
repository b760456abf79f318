"""What was found when rows were looked at, kept in the cache folder, so that the next start need not look again."""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

from datasets import Dataset

from qmixlora.data.images.appearance import APPEARANCE_VERSION
from qmixlora.data.refusals import Refusals
from qmixlora.data.rendering.collate import Collator
from qmixlora.files import cache_folder, write_json
from qmixlora.recipe import Data

VERSION = 1  # raise it with every change of what is refused


def place_of(rows: Dataset, collator: Collator, data: Data) -> Path:
    """The file for some rows (a mapped table of `store`, which is another one when anything in it changes), told apart
    by all that a verdict depends on.
    """
    tokenizer: Any = collator.processor.tokenizer
    settings = (data.max_length, data.max_pixels, data.max_image_tokens, collator.template_arguments)
    reader = (
        collator.processor.to_json_string(),
        collator.processor.chat_template,
        tokenizer.backend_tokenizer.to_str(),
    )
    told = repr((VERSION, APPEARANCE_VERSION, rows._fingerprint, settings, reader))
    return cache_folder() / "verdicts" / f"{hashlib.sha256(told.encode()).hexdigest()[:32]}.json"


def kept(place: Path, count: int) -> tuple[list[int], Refusals] | None:
    """(the rows that fit, those that do not) of `count`, as they were kept; None where nothing was."""
    try:
        found = json.loads(place.read_text(encoding="utf-8"))
        refused = set(found["refused"])
        return [index for index in range(count) if index not in refused], Refusals(**found["refusals"])
    except (OSError, ValueError, KeyError, TypeError):
        return None


def keep(place: Path, fit: list[int], count: int, refusals: Refusals) -> None:
    """Keep a verdict."""
    refused = sorted(set(range(count)) - set(fit))
    place.parent.mkdir(parents=True, exist_ok=True)
    write_json(place, {"refused": refused, "refusals": asdict(refusals)})
