"""Loading: a source's rows to a `datasets.Dataset` of conversations whose images are known to exist."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import datasets
from PIL import Image, UnidentifiedImageError

from qmixlora.errors import UserError

from .formats import Conversation, FormatError, ImageFile, to_conversation
from .sources import is_file, read_rows

FEATURES = datasets.Features(
    {
        "turns": [{"role": datasets.Value("string"), "text": datasets.Value("string")}],
        "images": datasets.List(datasets.Image(decode=False)),
        "task": datasets.Value("string"),
    }
)


def load_conversations(
    source: str, *, split: str = "train", image_root: str | None = None, task_field: str | None = None
) -> datasets.Dataset:
    """All conversations of a file (.json, .jsonl, .parquet) or of anything that `datasets.load_dataset` reads.

    Columns: `turns`, `images` (a path or the file's bytes each; not decoded yet) and `task`. Image paths are taken
    from `image_root`, or from the file's own folder. Every image's header is read now, so that a run does not stop
    over a missing file hours later.

    Raises:
        UserError: the file is missing, broken (with its line), empty, in an unknown format, or names an image that is
            missing or unreadable.
    """
    root = Path(image_root or (Path(source).parent if is_file(source) else "."))
    rows = read_rows(source, split)
    conversations = [_checked(row, f"{source}, {origin}", root, task_field) for origin, row in rows]
    if not conversations:
        raise UserError("The data set is empty.", where=source)
    return datasets.Dataset.from_list(conversations, features=FEATURES)


def _checked(row: Any, origin: str, root: Path, task_field: str | None) -> Conversation:
    if not isinstance(row, Mapping):
        raise UserError("A sample is a JSON object.", where=origin)
    try:
        turns, images, task = to_conversation(row, task_field)
    except FormatError as error:
        raise UserError(f"The sample {error}.", where=origin) from None
    return {"turns": turns, "images": [_located(image, root, origin) for image in images], "task": task}


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
