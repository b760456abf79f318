"""Loading: a source's rows to a `datasets.Dataset` of conversations whose images are known to exist."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import datasets

from qmixlora.data.formats import Conversation, FormatError
from qmixlora.data.refusals import PictureError, Refusals
from qmixlora.errors import UserError
from qmixlora.garbage import without_garbage_collection
from qmixlora.recipe import MAX_PIXELS, Columns

from . import store
from .json_files import Row
from .looks import ImageLooks, lead_there, size_of
from .rows import NoDialogueError, Reading, Sample, to_sample
from .sources import Source
from .unread import told_of
from .usual import columns_to_set
from .whole_columns import WholeColumns, list_answers

ROWS = 10_000  # whose images are looked at together


@dataclass(frozen=True)
class Loaded:
    """The conversations of one source or several, and the samples that were left out of so many that were read."""

    rows: datasets.Dataset
    refused: Refusals
    read: int

    def usable(self, source: str, on_bad_sample: Literal["stop", "skip"]) -> datasets.Dataset:
        """The rows; with `skip` it is said on stderr what was left out. Raises UserError if any was, with `stop`."""
        if self.refused.count and on_bad_sample == "stop":
            raise self.refused.error(source)
        self.refused.say(source, self.read)
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
    allow_outside: bool = False,
) -> datasets.Dataset:
    """All conversations of a source (docs/data.md); what was left out is said on stderr.

    Columns: `turns`, `images` (a path or the file's bytes each; not decoded yet), `task` (of the last answer), `tasks`
    (of all answers, where they differ), `references` (all right answers where the data has several), `learned`
    (of every answer, whether it is to be learned, where not all are) and `origin` (its place in the source). Other
    arguments as `load`. Raises UserError as `load` and `Loaded.usable`.
    """
    loaded = load(source, split, image_root, Reading(task_field, columns, template), max_pixels, allow_outside)
    return loaded.usable(source, on_bad_sample)


def load(
    source: str,
    split: str,
    image_root: str | None,
    reading: Reading,
    max_pixels: int = MAX_PIXELS,
    allow_outside: bool = False,
) -> Loaded:
    """Read a source, or take what an earlier start has kept of it.

    Image paths are taken from `image_root`, or from the file's own folder. Every image's header is read now, so that
    a run does not stop hours later over a missing file, or one of over `max_pixels` pixels. Images lie below that
    folder, unless the data is trusted to name any file (`allow_outside`).

    Raises:
        UserError: the source is missing, broken (with its line) or empty, not one of its samples can be read, no row
            has a column that the recipe names, or answers count their options from 1.
    """
    opened = Source.find(source, split, reading.subset)
    root = Path(image_root) if image_root else opened.folder
    refusals = Refusals()
    inside = None if allow_outside else [folder.resolve() for folder in (root, *opened.image_folders)]
    columns = None
    if reading.columns is not None:
        columns = WholeColumns(reading.columns, source, list_answers(opened.rows(), reading.columns.answer))
    images = ImageLooks(root, max_pixels, inside)
    let_through = opened.rows() if columns is None else columns.let_through(opened.rows())
    unread = Counter[str]()
    read = read_conversations(let_through, reading, images, unread)

    def doubts() -> list[str]:
        return [*told_of(unread, reading.form), *([] if columns is None else columns.doubts())]

    accepted = _accepted(read, refusals, doubts)
    with without_garbage_collection():
        if opened.size < store.SMALL:
            rows = store.in_memory(accepted)
        else:
            asked = (opened.name, split, str(root.resolve()), reading, max_pixels, allow_outside)
            place = store.place(asked, opened.state)
            kept = store.stored(place, lambda links: lead_there(links, root))
            rows, refusals = kept or (store.keep(place, accepted, refusals, images.links), refusals)
    if len(rows):
        return Loaded(rows, refusals, len(rows) + refusals.count)
    empty = UserError("The data set is empty.", where=source)
    raise refusals.error(source, any_left=False) if refusals.count else empty


def read_conversations(
    rows: Iterable[Row | UserError], reading: Reading, images: ImageLooks, unread: Counter[str] | None = None
) -> Iterator[Conversation | UserError]:
    """Each row as a conversation, or why it is refused, with its place; keys with `unread` pictures are counted."""
    for batch in store.in_batches((_sample(row, reading) for row in rows), _image_bytes, ROWS):
        images.look_ahead(image for _, sample in batch if isinstance(sample, Sample) for image in sample.images)
        for where, sample in batch:
            if unread is not None and isinstance(sample, Sample):
                unread.update(sample.unread)
            yield sample if isinstance(sample, UserError) else _conversation(sample, where, images)


def _sample(row: Row | UserError, reading: Reading) -> tuple[str, Sample | UserError]:
    """(the place of a row, the row as a sample or why it is refused)."""
    if isinstance(row, UserError):
        return row.where, row
    if not isinstance(row.value, Mapping):
        return row.where, UserError("A sample is a JSON object.", where=row.where)
    try:
        return row.where, to_sample(row.value, reading)
    except FormatError as error:
        hint = columns_to_set(row.value) if isinstance(error, NoDialogueError) else ""
        return row.where, UserError(f"The sample {error}{hint}.", where=row.where)


def _conversation(sample: Sample, where: str, images: ImageLooks) -> Conversation | UserError:
    try:
        files = [images.located(image, where) for image in sample.images]
    except UserError as error:
        return PictureError(error.what, where=error.where, fix=error.fix)
    return {
        "turns": sample.turns,
        "images": files,
        "task": sample.task,
        "tasks": sample.tasks,
        "references": sample.references,
        "learned": sample.learned,
        "origin": where,
    }


def _image_bytes(read: tuple[str, Sample | UserError]) -> int:
    sample = read[1]
    return sum(map(size_of, sample.images)) if isinstance(sample, Sample) else 0


def _accepted(
    results: Iterable[Conversation | UserError], refusals: Refusals, doubts: Callable[[], list[str]]
) -> Iterator[Conversation]:
    """The conversations; refused samples are counted, and doubts about all of them are told at the end."""
    for result in results:
        if isinstance(result, UserError):
            refusals.add(result)
        else:
            yield result
    refusals.doubts += doubts()
