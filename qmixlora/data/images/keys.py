"""The images of a data set without their being opened: what tells them apart, and whether their files have changed.

Shapes: N images of all rows, R rows.
"""

from __future__ import annotations

import hashlib
from collections import OrderedDict
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow.compute
from datasets import Dataset
from numpy.typing import NDArray

from qmixlora.data.formats import ImageFile

BATCH = 1000  # rows at a time
REMEMBERED = 8  # data sets; their images' content is read once by a process
_known: OrderedDict[str, ImageKeys] = OrderedDict()


@dataclass(frozen=True)
class ImageKeys:
    """A number for every image, the same for the same file or the same bytes, row after row; and how many a row has."""

    keys_N: NDArray[np.uint64]
    count_R: NDArray[np.int64]

    def rows(self) -> Iterator[list[int]]:
        """The keys of each row."""
        start, keys = 0, self.keys_N.tolist()
        for count in self.count_R.tolist():
            yield keys[start : start + count]
            start += count

    def rows_with(self, others_N: NDArray[np.uint64]) -> NDArray[np.int64]:
        """The numbers of the rows that have an image among others."""
        row_N = np.repeat(np.arange(len(self.count_R)), self.count_R)
        return np.unique(row_N[np.isin(self.keys_N, others_N)])


def image_keys(rows: Dataset) -> ImageKeys:
    """The keys of the images of all rows. What was asked for last is remembered, since bytes take long to read."""
    if rows._fingerprint not in _known:
        _known[rows._fingerprint] = _image_keys(rows)
        while len(_known) > REMEMBERED:
            _known.popitem(last=False)
    return _known[rows._fingerprint]


def image_key(path: str | None, content: bytes | None) -> int:
    """The key of one image."""
    return key_of(content or str(path).encode(errors="surrogateescape"))


def key_of(content: bytes) -> int:
    """A number for some content, of 64 bits."""
    return int.from_bytes(hashlib.blake2b(content, digest_size=8).digest())


def content_key(image: ImageFile) -> str:
    """The key of an image's content, in whatever file it is: 16 hexadecimal digits. Raises OSError."""
    content = image["bytes"] or Path(str(image["path"])).read_bytes()
    return f"{image_key(None, content):016x}"


def _image_keys(rows: Dataset) -> ImageKeys:
    keys: list[int] = []
    counts: list[int] = []
    of_path: dict[str | None, int] = {}
    for table in rows.select_columns(["images"]).with_format("arrow").iter(BATCH):
        lists = table.column("images").combine_chunks()
        counts += lists.value_lengths().to_pylist()
        images = lists.flatten()
        if not len(images):  # which may have no type
            continue
        for path, content in zip(images.field("path").to_pylist(), images.field("bytes"), strict=True):
            if content.is_valid and len(content.as_py()):
                keys.append(image_key(path, content.as_py()))
            else:
                known = of_path.get(path)
                keys.append(of_path.setdefault(path, image_key(path, None)) if known is None else known)
    return ImageKeys(np.array(keys, np.uint64), np.array(counts, np.int64))


def images_state(rows: Dataset) -> str | None:
    """What changes when an image file that the rows name does, by size and time; None where one is missing."""
    state = hashlib.blake2b(digest_size=16)
    for path in sorted(image_paths(rows)):
        try:
            about = Path(path).stat()
        except OSError:
            return None
        state.update(f"{path}\0{about.st_size}\0{about.st_mtime_ns}\n".encode(errors="surrogateescape"))
    return state.hexdigest()


def image_paths(rows: Dataset) -> set[str]:
    """Every path of an image that is a file of its own."""
    paths: set[str] = set()
    for chunk in rows.data.column("images").chunks:
        images = chunk.flatten()
        named = images.field("path").filter(pyarrow.compute.is_null(images.field("bytes")))
        paths.update(named.unique().to_pylist())
    return paths
