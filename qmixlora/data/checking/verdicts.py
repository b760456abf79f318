"""What was found when rows were looked at, kept in the cache folder, so that the next start need not look again."""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict, dataclass
from pathlib import Path

import PIL
from datasets import Dataset

from qmixlora.data.images.appearance import APPEARANCE_VERSION
from qmixlora.data.images.keys import images_state
from qmixlora.data.refusals import Refusals
from qmixlora.data.rendering.collate import Collator
from qmixlora.data.rendering.lengths import Lengths
from qmixlora.files import cache_folder, write_json
from qmixlora.reader import read_by
from qmixlora.recipe import Data

from .look import look_at
from .survey import Survey, survey

MANY = 2000  # rows that take long enough to be remembered
VERSION = 6  # raise it with every change of what is refused, or kept


@dataclass(frozen=True)
class Verdict:
    """The rows that fit, by number; what was refused; the survey of those that fit (None where none does); how many
    rows have how many images; how many occur again; and of rows with an image over `data.max_image_tokens`, its image
    tokens.
    """

    kept: list[int]
    refusals: Refusals
    survey: Survey | None
    images: dict[int, int]
    duplicates: int
    over: list[int]

    def told_of_images(self, budget: int | None) -> str | None:
        """What to say of images over `data.max_image_tokens`; None where there are none."""
        if not self.over:
            return None
        return (
            f"{len(self.over)} samples show images of more tokens than data.max_image_tokens, {budget} (up to "
            f"{max(self.over)}), which the model's processor makes of their shape; pad or crop them."
        )


def verdict_on(rows: Dataset, length: Lengths, data: Data) -> Verdict:
    """What a look at all rows finds. Of many rows it is remembered."""
    if len(rows) < MANY:
        return _found(rows, length, data)
    place = _place_of(rows, length.collator, data)
    known = _known(place, len(rows))
    if known is None:
        known = _found(rows, length, data)
        _keep(place, known, len(rows))
    return known


def _found(rows: Dataset, length: Lengths, data: Data) -> Verdict:
    look = look_at(rows, length, data)
    fit, facts = rows, None
    if look.kept:
        fit = rows if not look.refusals.count else rows.select(look.kept)
        facts = survey(fit, length, look.image_tokens_R[look.kept], look.characters_R[look.kept])
    return Verdict(look.kept, look.refusals, facts, look.images, look.duplicates, look.over)


def _place_of(rows: Dataset, collator: Collator, data: Data) -> Path:
    """The file for some rows (a table of `store`, which is another one when anything in it changes) and the images that
    they name, told apart by all that a verdict depends on.
    """
    settings = (
        data.max_length, data.max_pixels, data.max_image_tokens, data.check_images, collator.template_arguments,
        *collator.special_tokens,
    )  # fmt: skip
    reader = sorted(read_by(collator.processor).items())
    versions = (VERSION, APPEARANCE_VERSION, PIL.__version__)
    told = repr((versions, rows._fingerprint, images_state(rows), settings, reader))
    return cache_folder() / "verdicts" / f"{hashlib.sha256(told.encode()).hexdigest()[:32]}.json"


def _known(place: Path, count: int) -> Verdict | None:
    """What was kept of so many rows; None where nothing was."""
    try:
        found = json.loads(place.read_text(encoding="utf-8"))
        refused = set(found["refused"])
        return Verdict(
            kept=[index for index in range(count) if index not in refused],
            refusals=Refusals(**found["refusals"]),
            survey=None if found["survey"] is None else Survey(**found["survey"]),
            images={int(number): rows for number, rows in found["images"].items()},
            duplicates=found["duplicates"],
            over=found["over"],
        )
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _keep(place: Path, verdict: Verdict, count: int) -> None:
    place.parent.mkdir(parents=True, exist_ok=True)
    told = asdict(verdict)
    told["refused"] = sorted(set(range(count)) - set(told.pop("kept")))
    write_json(place, told)
