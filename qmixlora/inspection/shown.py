"""A few samples of a data set for people to look at: what is said, and the images with their sizes."""

from __future__ import annotations

import random
from dataclasses import dataclass
from itertools import chain, islice, zip_longest

from datasets import Dataset

from qmixlora.data import IMAGE, Checked, ImageFile, Turn, image_size, indices_by_task

MARK = "[image]"  # how the place of an image is written


@dataclass(frozen=True)
class ShownImage:
    """An image: its path, or what its bytes are called, and its size in pixels as it is seen."""

    name: str
    width: int
    height: int
    file: ImageFile


@dataclass(frozen=True)
class ShownSample:
    """A sample: the number of its row among those that fit, its turns with `MARK` where an image stands."""

    split: str
    index: int
    task: str
    turns: list[Turn]
    images: list[ShownImage]

    def to_dict(self) -> dict[str, object]:
        """The sample in the JSON of `qmixlora data --show`."""
        images = [{"name": image.name, "width": image.width, "height": image.height} for image in self.images]
        return {
            "split": self.split, "index": self.index, "task": self.task, "turns": self.turns, "images": images,
        }  # fmt: skip


def samples_of(found: Checked, count: int) -> list[ShownSample]:
    """So many samples of every split, drawn (always the same ones), of all tasks in turn."""
    return [_shown(split, rows, index) for split, rows in found.rows.items() for index in _drawn(rows, count)]


def _drawn(rows: Dataset, count: int) -> list[int]:
    draw = random.Random(0)
    by_task = [draw.sample(own, min(count, len(own))) for own in indices_by_task(rows).values()] if len(rows) else []
    in_turn = (index for index in chain.from_iterable(zip_longest(*by_task)) if index is not None)
    return list(islice(in_turn, count))


def _shown(split: str, rows: Dataset, index: int) -> ShownSample:
    row = rows[index]
    turns: list[Turn] = [{"role": turn["role"], "text": turn["text"].replace(IMAGE, MARK)} for turn in row["turns"]]
    images = [ShownImage(str(file["path"]), *image_size(file), file) for file in row["images"]]
    return ShownSample(split, index, row["task"], turns, images)
