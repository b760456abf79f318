"""What tells rows apart: each by itself, and many by one digest."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from pathlib import PurePath

import numpy as np
import pyarrow.compute as pc
from datasets import Dataset

from qmixlora.data.images.keys import image_keys, key_of
from qmixlora.data.reading.store import records

ROWS = 1000  # that are told apart at a time
LEARNED = ("tasks", "learned")  # columns that say something of answers, in some rows
SCORED = (*LEARNED, "references")


def text_keys(rows: Dataset) -> dict[int, int]:
    """By its number, the key of every row without an image, the same for the same turns. (The others are told apart by
    their images, `image_keys`.)
    """
    without = np.flatnonzero(image_keys(rows).count_R == 0).tolist()
    turns = records(rows.select_columns(["turns"]).select(without))
    return {
        index: key_of(repr(row["turns"]).encode(errors="replace")) for index, row in zip(without, turns, strict=True)
    }


def fingerprint(rows: Dataset, of_answers: Sequence[str] = LEARNED) -> str:
    """What tells data apart: the texts, tasks and images of its rows in their order, and which answers are learned; or,
    with `SCORED`, what other answers are right, too. (Of images it is the names and the sizes of bytes, so that data
    can be moved.)
    """
    digest = hashlib.sha256()
    for batch in rows.with_format("arrow").iter(ROWS):  # by column: no image's bytes are taken out
        images = pc.list_flatten(batch["images"])
        names = [PurePath(path or "").name for path in pc.struct_field(images, "path").to_pylist()]
        sizes = pc.fill_null(pc.binary_length(pc.struct_field(images, "bytes")), 0).to_pylist()
        counts = pc.list_value_length(batch["images"]).to_pylist()
        told = (batch["turns"].to_pylist(), batch["task"].to_pylist(), counts, names, sizes)
        digest.update(repr(told).encode(errors="replace"))
        for name in of_answers:
            if name in batch.column_names and any(values := batch[name].to_pylist()):
                digest.update(repr((name, values)).encode(errors="replace"))
    return digest.hexdigest()[:32]
