"""Loading: a source's rows to a `datasets.Dataset` of conversations whose images are known to exist."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, Literal

import datasets

from qmixlora.data.formats import Conversation, FormatError, ImageFile
from qmixlora.data.images.files import locate
from qmixlora.data.images.opening import check_header
from qmixlora.data.refusals import PictureError, Refusals
from qmixlora.errors import UserError
from qmixlora.recipe import MAX_PIXELS, Columns

from . import store
from .json_files import Row
from .rows import Reading, to_sample
from .sources import Source

REMEMBERED = 4096  # images whose check is remembered: data often asks several questions about one

LONGEST = 4096  # characters of an image's name; what is longer holds the image itself


@dataclass(frozen=True)
class Loaded:
    """The conversations of one source or several, and the samples that were left out."""

    rows: datasets.Dataset
    refused: Refusals

    def usable(self, source: str, on_bad_sample: Literal["stop", "skip"]) -> datasets.Dataset:
        """The rows; with `skip` it is said on stderr what was left out. Raises UserError if any was, with `stop`."""
        if self.refused.count and on_bad_sample == "stop":
            raise self.refused.error(source)
        self.refused.say(source, len(self.rows) + self.refused.count)
        return self.rows


def load_conversations(
    source: str,
    *,
    split: str = "train",
    image_root: str | None = None,
    task_field: str | None = None,
    columns: Columns | None = None,
    template: str = "",
    on_bad_sample: Literal["stop", "skip"] = "stop",
    max_pixels: int = MAX_PIXELS,
) -> datasets.Dataset:
    """All conversations of a source (docs/data.md); what was left out is said on stderr.

    Columns: `turns`, `images` (a path or the file's bytes each; not decoded yet), `task` and `references` (all right
    answers where the data has several). Other arguments as `load`. Raises UserError as `load` and `Loaded.usable`.
    """
    loaded = load(source, split, image_root, Reading(task_field, columns, template), max_pixels)
    return loaded.usable(source, on_bad_sample)


def load(source: str, split: str, image_root: str | None, reading: Reading, max_pixels: int = MAX_PIXELS) -> Loaded:
    """Read a source, or take what an earlier start has kept of it.

    Image paths are taken from `image_root`, or from the file's own folder. Every image's header is read now, so that
    a run does not stop hours later over a missing file, or one of over `max_pixels` pixels.

    Raises:
        UserError: the source is missing, broken (with its line) or empty, or not one of its samples can be read.
    """
    opened = Source.find(source, split)
    root = Path(image_root) if image_root else opened.folder
    refusals = Refusals()
    results = read_conversations(opened.rows(), root, reading, max_pixels)
    if opened.size < store.SMALL:
        loaded = Loaded(store.in_memory(_accepted(results, refusals)), refusals)
    else:
        place = store.place((opened.name, split, str(root.resolve()), reading, max_pixels), opened.state)
        kept = store.stored(place)
        loaded = Loaded(*kept) if kept else Loaded(store.keep(place, _accepted(results, refusals), refusals), refusals)
    if len(loaded.rows):
        return loaded
    raise loaded.refused.error(source) if loaded.refused.count else UserError("The data set is empty.", where=source)


def read_conversations(
    rows: Iterable[Row | UserError], root: Path, reading: Reading, max_pixels: int = MAX_PIXELS
) -> Iterator[Conversation | UserError]:
    """Each row as a conversation, or why it is refused, with its place."""
    locate_here = _remembering(root, max_pixels)
    for row in rows:
        try:
            yield row if isinstance(row, UserError) else _checked(row, reading, locate_here)
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


def _checked(row: Row, reading: Reading, located: Locate) -> Conversation:
    if not isinstance(row.value, Mapping):
        raise UserError("A sample is a JSON object.", where=row.where)
    try:
        turns, images, task, references = to_sample(row.value, reading)
    except FormatError as error:
        raise UserError(f"The sample {error}.", where=row.where) from None
    try:
        files = [located(image, row.where) for image in images]
    except UserError as error:
        raise PictureError(error.what, where=error.where, fix=error.fix) from None
    return {"turns": turns, "images": files, "task": task, "references": references}


def _remembering(root: Path, max_pixels: int) -> Locate:
    """`_located` under a root, which looks at a path once while it is remembered."""

    @lru_cache(REMEMBERED)
    def at(path: str) -> ImageFile:
        return _located(path, root, "", max_pixels)

    def located(image: Any, origin: str) -> ImageFile:
        if not isinstance(image, str) or len(image) > LONGEST:
            return _located(image, root, origin, max_pixels)
        try:
            return at(image)
        except UserError:
            return _located(image, root, origin, max_pixels)  # which names the row

    return located


def _located(image: Any, root: Path, origin: str, max_pixels: int) -> ImageFile:
    """An image as `{"path", "bytes"}`, known to have a readable header and not too many pixels."""
    file = locate(image, root, origin)
    check_header(file, max_pixels, named_by="" if file["bytes"] else origin)
    return file
