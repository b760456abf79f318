"""A look at every row, on all cores: whether a run can learn it, and how large it is.

Shapes: R rows.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from functools import cache, partial
from typing import NamedTuple

import numpy as np
from datasets import Dataset
from numpy.typing import NDArray

from qmixlora.data.formats import IMAGE, Conversation, ImageFile, Turn, question_about, sample_name
from qmixlora.data.images.keys import image_key, key_of
from qmixlora.data.images.opening import blank_image, check_body
from qmixlora.data.images.shapes import shape_problem
from qmixlora.data.reading.store import records
from qmixlora.data.refusals import Refusals
from qmixlora.data.rendering.lengths import SMALL, Lengths, by_path
from qmixlora.data.rendering.refusing import check_length
from qmixlora.errors import UserError
from qmixlora.garbage import without_garbage_collection
from qmixlora.parallel import in_chunks
from qmixlora.progress import progress
from qmixlora.recipe import Data

CHUNK = 500  # rows that a process looks at before it is given others


@dataclass(frozen=True)
class Look:
    """The rows that fit, and what was refused; how many rows have how many images, and how many occur again; of rows
    with an image over `data.max_image_tokens`, its image tokens; and of all rows their images' tokens (-1 where they do
    not fit) and their characters.
    """

    kept: list[int]
    refusals: Refusals
    images: dict[int, int]
    duplicates: int
    over: list[int]
    image_tokens_R: NDArray[np.int32]
    characters_R: NDArray[np.int32]


class _Seen(NamedTuple):
    """One row: why it is refused, if it is, as (where, what); the tokens of its images, and its characters; their
    number; what makes it the same as another; and the image tokens of an image over the budget, 0 where none is.
    """

    refused: tuple[str, str] | None
    image_tokens: int
    characters: int
    images: int
    identity: int
    over: int


def look_at(rows: Dataset, length: Lengths, data: Data) -> Look:
    """Look at all rows.

    Refused are rows longer than `data.max_length`, rows that the template cannot render, images of a shape that the
    processor refuses, and with `data.check_images: full` images that cannot be decoded.
    """
    judge, refusals, kept = _Judge(length, data), Refusals(), []
    with progress("looking at samples") as tell:
        parts = in_chunks(partial(_seen, judge, rows), len(rows), CHUNK, tell)
    seen = [one for part in parts for one in part]
    for index, one in enumerate(seen):
        if one.refused is None:
            kept.append(index)
        else:
            refusals.add(UserError(one.refused[1], where=one.refused[0]))
    return Look(
        kept,
        refusals,
        images=dict(sorted(Counter(one.images for one in seen).items())),
        duplicates=len(seen) - len({one.identity for one in seen}),
        over=[one.over for one in seen if one.refused is None and one.over],
        image_tokens_R=np.array([one.image_tokens for one in seen], np.int32),
        characters_R=np.array([one.characters for one in seen], np.int32),
    )


def _seen(judge: _Judge, rows: Dataset, chunk: range) -> list[_Seen]:
    with without_garbage_collection():
        return [judge.seen(row) for row in records(rows.select(chunk))]


class _Judge:
    """Looks at rows one by one. What is asked again and again is remembered."""

    def __init__(self, length: Lengths, data: Data) -> None:
        self.length, self.collator, self.data = length, length.collator, data
        self.frame = cache(self._frame)
        self.alone = cache(self._alone)
        self.problem = cache(lambda size: shape_problem(self.collator.processor, size, data.max_pixels))
        budget = data.max_image_tokens
        self.over = cache(lambda size: 0 if budget is None else self.length.over(size, budget))
        self.body = by_path(lambda image: check_body(image, data.max_pixels))

    def seen(self, row: Conversation) -> _Seen:
        """What there is to know of a row."""
        characters = sum(len(turn["text"]) for turn in row["turns"])
        images = [image_key(image["path"], image["bytes"]) for image in row["images"]]
        told = repr(([[turn["role"], turn["text"]] for turn in row["turns"]], images))
        identity = key_of(told.encode(errors="surrogateescape"))
        try:
            image_tokens, refused = self._image_tokens(row), None
            over = max((self.over(self.length.size(image)) for image in row["images"]), default=0)
        except UserError as error:
            name = sample_name(row)
            over, image_tokens, refused = 0, -1, (f"{error.where} of {name}" if error.where else name, error.what)
        return _Seen(refused, image_tokens, characters, len(images), identity, over)

    def _image_tokens(self, row: Conversation) -> int:
        """The tokens of a row's images. Raises UserError where the row cannot be taught."""
        if not row["images"] and (why := self.alone()):
            raise UserError(why, where="")
        for image in row["images"]:
            self._check(image)
        image_tokens = self.length.of_images(row)
        # a token stands for one byte at least, so that most rows need not be tokenized
        texts = sum(len(turn["text"].encode(errors="replace")) + 2 for turn in row["turns"])
        frame = self.frame(tuple((turn["role"], _without_words(turn["text"])) for turn in row["turns"]))
        longest = self.data.max_length
        if frame + texts + image_tokens > longest:
            check_length(self.length(row, image_tokens), longest)
        return image_tokens

    def _check(self, image: ImageFile) -> None:
        if self.data.check_images == "full":
            self.body(image)
        if problem := self.problem(self.length.size(image)):
            raise UserError(problem, where="")

    def _alone(self) -> str | None:
        """Why the processor takes no sample without an image, if it takes none."""
        try:
            self.collator.prompts([question_about([], "a")])
        except UserError as error:
            return error.what
        return None

    def _frame(self, shape: tuple[tuple[str, str], ...]) -> int:
        """The tokens that the template writes around texts, in a row whose turns have these roles and `_without_words`.
        Raises UserError if it refuses such rows, as some do with images beside a system's words.
        """
        turns: list[Turn] = [{"role": role, "text": text} for role, text in shape]
        images = [blank_image(SMALL)] * sum(text.count(IMAGE) for _, text in shape)
        return self.length({"turns": turns, "images": images, "task": ""}, 0)


def _without_words(text: str) -> str:
    """A turn's text with a letter for the words before, between and behind its images."""
    return IMAGE.join("a" if part.strip() else "" for part in text.split(IMAGE))
