"""Loading: a source's rows to a `datasets.Dataset` of conversations whose images are known to exist."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, Literal

import datasets
from PIL import Image, UnidentifiedImageError

from qmixlora.errors import UserError
from qmixlora.recipe import Columns

from . import store
from .formats import Conversation, FormatError, ImageFile
from .json_files import Row
from .refusals import PictureError, Refusals
from .rows import Reading, to_sample
from .sources import Source

REMEMBERED = 4096  # images whose check is remembered: data often asks several questions about one

LONGEST = 4096  # characters of an image's name; what is longer holds the image itself


@dataclass(frozen=True)
class Loaded:
    """The conversations of a source, and the samples that were left out of it."""

    rows: datasets.Dataset
    refused: Refusals


def load_conversations(
    source: str,
    *,
    split: str = "train",
    image_root: str | None = None,
    task_field: str | None = None,
    columns: Columns | None = None,
    template: str = "",
    on_bad_sample: Literal["stop", "skip"] = "stop",
) -> datasets.Dataset:
    """All conversations of a source (docs/data.md); what was left out is said on stderr.

    Columns: `turns`, `images` (a path or the file's bytes each; not decoded yet), `task` and `references` (all right
    answers where the data has several). Other arguments and errors as `load`.
    """
    loaded = load(source, split, image_root, Reading(task_field, columns, template), on_bad_sample)
    if loaded.refused.count:
        total = len(loaded.rows) + loaded.refused.count
        print(f"{source}: {loaded.refused.count} of {total} samples left out:", file=sys.stderr)
        print(loaded.refused.listed(), file=sys.stderr)
    return loaded.rows


def load(
    source: str,
    split: str,
    image_root: str | None,
    reading: Reading,
    on_bad_sample: Literal["stop", "skip"],
) -> Loaded:
    """Read a source, or take what an earlier start has kept of it.

    Image paths are taken from `image_root`, or from the file's own folder. Every image's header is read now, so that
    a run does not stop over a missing file hours later. With `stop` a sample that cannot be read is an error; `skip`
    leaves such samples out.

    Raises:
        UserError: the source is missing, broken (with its line) or empty; or samples are refused: all are counted, and
            the first ten named.
    """
    opened = Source.find(source, split)
    root = Path(image_root) if image_root else opened.folder
    refusals = Refusals()
    results = read_conversations(opened.rows(), root, reading)
    if opened.size < store.SMALL:
        loaded = Loaded(store.in_memory(_accepted(results, refusals)), refusals)
    else:
        place = store.place((opened.name, split, str(root.resolve()), reading), opened.state)
        kept = store.stored(place)
        loaded = Loaded(*kept) if kept else Loaded(store.keep(place, _accepted(results, refusals), refusals), refusals)
    if loaded.refused.count and (on_bad_sample == "stop" or not len(loaded.rows)):
        raise loaded.refused.error(source)
    if not len(loaded.rows):
        raise UserError("The data set is empty.", where=source)
    return loaded


def read_conversations(
    rows: Iterable[Row | UserError], root: Path, reading: Reading
) -> Iterator[Conversation | UserError]:
    """Each row as a conversation, or why it is refused, with its place."""
    locate = _remembering(root)
    for row in rows:
        try:
            yield row if isinstance(row, UserError) else _checked(row, reading, locate)
        except UserError as refusal:
            yield refusal.with_traceback(None)


def _accepted(results: Iterable[Conversation | UserError], refusals: Refusals) -> Iterator[Conversation]:
    """The conversations; refused samples are counted."""
    for result in results:
        if isinstance(result, UserError):
            refusals.add(result)
        else:
            yield result


Locate = Callable[[Any, str], ImageFile]


def _checked(row: Row, reading: Reading, locate: Locate) -> Conversation:
    if not isinstance(row.value, Mapping):
        raise UserError("A sample is a JSON object.", where=row.where)
    try:
        turns, images, task, references = to_sample(row.value, reading)
    except FormatError as error:
        raise UserError(f"The sample {error}.", where=row.where) from None
    try:
        located = [locate(image, row.where) for image in images]
    except UserError as error:
        raise PictureError(error.what, where=error.where, fix=error.fix) from None
    return {"turns": turns, "images": located, "task": task, "references": references}


def _remembering(root: Path) -> Locate:
    """`_located` under a root, which looks at a path once while it is remembered."""

    @lru_cache(REMEMBERED)
    def at(path: str) -> ImageFile:
        return _located(path, root, "")

    def locate(image: Any, origin: str) -> ImageFile:
        if not isinstance(image, str) or len(image) > LONGEST:
            return _located(image, root, origin)
        try:
            return at(image)
        except UserError:
            return _located(image, root, origin)  # which names the row

    return locate


def _located(image: Any, root: Path, origin: str) -> ImageFile:
    """An image as `{"path", "bytes"}`, known to have a readable header."""
    if isinstance(image, Mapping):
        if image.get("bytes"):
            return {"path": image.get("path"), "bytes": image["bytes"]}
        image = image.get("path") or image.get("url")
    path = root / str(image).removeprefix("file://")
    if not path.is_file():
        raise UserError("An image is missing.", where=f"{path} (named by {origin})", fix="Set data.image_root?")
    try:
        with Image.open(path):
            pass
    except (UnidentifiedImageError, OSError) as error:
        raise UserError(f"An image cannot be read: {error}", where=f"{path} (named by {origin})") from None
    return {"path": str(path.resolve()), "bytes": None}
