"""Files and data sets to a `datasets.Dataset` of conversations whose images are known to exist."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import datasets
from PIL import Image, UnidentifiedImageError

from qmixlora.errors import UserError

from .formats import Conversation, FormatError, ImageFile, to_conversation

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
    path = Path(source)
    if path.suffix in {".json", ".jsonl", ".parquet"}:
        if not path.is_file():
            raise UserError("There is no such data file.", where=source, fix="Check data.train and its siblings.")
        rows: Any = _read_parquet(path) if path.suffix == ".parquet" else _read_json(path)
        root = Path(image_root) if image_root else path.parent
    else:
        rows, root = _read_dataset(source, split), Path(image_root or ".")
    conversations = [_checked(row, f"{source}, {origin}", root, task_field) for origin, row in rows]
    if not conversations:
        raise UserError("The data set is empty.", where=source)
    return datasets.Dataset.from_list(conversations, features=FEATURES)


def _read_json(path: Path) -> Iterator[tuple[str, Any]]:
    """(origin, sample): by line for JSON Lines, by index for a JSON list. Parsed here: errors must name a line."""
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"Cannot read the data file: {error}", where=str(path)) from None
    if path.suffix == ".jsonl":
        for number, line in enumerate(text.splitlines(), start=1):
            if line.strip():
                yield f"line {number}", _parse(line, path, number)
        return
    rows = _parse(text, path, 1)
    if not isinstance(rows, list):
        raise UserError("A data file is a JSON list of samples.", where=str(path), fix="Or use .jsonl, one per line.")
    yield from ((f"sample {index}", row) for index, row in enumerate(rows))


def _parse(text: str, path: Path, first_line: int) -> Any:
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        line = first_line + error.lineno - 1
        raise UserError(
            f"Broken JSON: {error.msg}.", where=f"{path}, line {line}, column {error.colno}", fix="Correct that line."
        ) from None


def _read_parquet(path: Path) -> Iterator[tuple[str, Any]]:
    try:
        data = datasets.Dataset.from_parquet(str(path))
    except Exception as error:  # datasets wraps whatever Arrow raises
        raise UserError(f"Cannot read the data file: {error}", where=str(path)) from None
    return _rows(data)


def _read_dataset(source: str, split: str) -> Iterator[tuple[str, Any]]:
    try:
        data = datasets.load_dataset(source, split=split)
    except Exception as error:  # many kinds, from many libraries
        raise UserError(
            f"Cannot load the data set: {error}", where=source, fix="Give a data file, or a data set on the hub."
        ) from None
    return _rows(data)


def _rows(data: datasets.Dataset) -> Iterator[tuple[str, Any]]:
    for name, feature in data.features.items():
        if isinstance(feature, datasets.Image):
            data = data.cast_column(name, datasets.Image(decode=False))
    return ((f"row {index}", row) for index, row in enumerate(data))


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
