"""Conversations as Arrow tables: on the disk, mapped into memory, and there again at the next start.

A large source is kept in the cache folder under what it was read from and how; one that has changed is read anew. What
is kept stays valid while the pictures that it names are there, and the same by size and time, and links lead to them.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any, TypeVar

import datasets
import pyarrow

from qmixlora.data.formats import Conversation
from qmixlora.data.images.keys import images_state
from qmixlora.data.refusals import Refusals
from qmixlora.errors import UserError
from qmixlora.files import cache_folder, clear_disk_errors, replacing, write_json

T = TypeVar("T")
VERSION = 6  # of what is kept; raised whenever the same source would be read differently
SMALL = 8 << 20  # bytes of a file that is read anew at every start, and held in memory
ROWS = 1000  # that are written at a time
BYTES = 16 << 20  # of images, that are held at a time
TABLE, ABOUT = "rows.arrow", "about.json"
FEATURES = datasets.Features(
    {
        "turns": [{"role": datasets.Value("string"), "text": datasets.Value("string")}],
        "images": datasets.List(datasets.Image(decode=False)),
        "task": datasets.Value("string"),
        "tasks": datasets.List(datasets.Value("string")),
        "references": datasets.List(datasets.Value("string")),
        "learned": datasets.List(datasets.Value("bool")),
        "origin": datasets.Value("string"),
    }
)
SCHEMA = FEATURES.arrow_schema


def place(settings: Any, content: Any) -> Path:
    """The folder for conversations of a source that is read with these settings, by the source's present content."""
    words = [hashlib.sha256(repr(part).encode()).hexdigest()[:24] for part in (settings, (VERSION, content))]
    return cache_folder() / "conversations" / words[0] / words[1]


def stored(folder: Path, lead_there: Callable[[Mapping[str, str]], bool]) -> tuple[datasets.Dataset, Refusals] | None:
    """What is kept in a folder; None if it is not whole, or if pictures may have changed: one is no longer there or
    another one, names of them do not `lead_there` any more, or samples were refused over theirs.
    """
    try:
        about = json.loads((folder / ABOUT).read_text(encoding="utf-8"))
        refusals, state, links = Refusals(**about["refusals"]), about["images"], about["links"]
        rows = datasets.Dataset.from_file(str(folder / TABLE))
    except (OSError, ValueError, TypeError, KeyError):
        return None
    same = not refusals.pictures and images_state(rows) == state and lead_there(links)
    return (rows, refusals) if same else None


def keep(
    folder: Path, conversations: Iterable[Conversation], refusals: Refusals, links: Mapping[str, str]
) -> datasets.Dataset:
    """Write conversations into a folder, in place of those of an earlier state of the source.

    `refusals`, and `links` (names of pictures, and where else they lead), are written when all conversations are, since
    they grow with them.
    """
    with clear_disk_errors(folder, "Make room, or set XDG_CACHE_HOME to another folder."):
        try:
            with replacing(folder) as temporary:
                temporary.mkdir()
                with pyarrow.OSFile(str(temporary / TABLE), "wb") as sink:
                    _write(sink, conversations)
                state = images_state(datasets.Dataset.from_file(str(temporary / TABLE)))
                write_json(temporary / ABOUT, {"refusals": asdict(refusals), "images": state, "links": dict(links)})
        except PermissionError as error:
            fix = "Set XDG_CACHE_HOME to a folder that can be written."
            raise UserError(f"The cache cannot be written: {error}", where=str(folder), fix=fix) from None
    for other in folder.parent.iterdir():
        if other != folder and not other.name.startswith("."):
            shutil.rmtree(other, ignore_errors=True)  # a table that is still mapped stays, where the system needs that
    return datasets.Dataset.from_file(str(folder / TABLE))


def in_memory(conversations: Iterable[Conversation]) -> datasets.Dataset:
    """The same table, of a small source."""
    sink = pyarrow.BufferOutputStream()
    _write(sink, conversations)
    return datasets.Dataset.from_buffer(sink.getvalue())


def records(rows: datasets.Dataset) -> Iterator[Any]:
    """The rows as they are stored (of images path and bytes), each a dictionary of its columns; a batch is taken out of
    the table at a time, since row by row takes `datasets` five times as long.
    """
    for table in rows.with_format("arrow").iter(ROWS):
        yield from table.to_pylist()


def _write(sink: Any, conversations: Iterable[Conversation]) -> None:
    with pyarrow.ipc.new_stream(sink, SCHEMA) as writer:
        for batch in in_batches(conversations, _image_bytes, ROWS):
            writer.write_batch(pyarrow.RecordBatch.from_pylist(batch, schema=SCHEMA))
    pyarrow.default_memory_pool().release_unused()  # a page of pictures in Parquet may have taken hundreds of MiB


def _image_bytes(conversation: Conversation) -> int:
    return sum(len(image["bytes"] or b"") for image in conversation["images"])


def in_batches(items: Iterable[T], size_of: Callable[[T], int], most: int) -> Iterator[list[T]]:
    """Items in their order, at most so many at a time, and no more than it takes to have `BYTES`."""
    batch: list[T] = []
    size = 0
    for item in items:
        batch.append(item)
        size += size_of(item)
        if len(batch) >= most or size >= BYTES:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch
