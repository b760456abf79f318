"""Sources of data: files and data sets, read row by row, each row with its origin for messages."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import datasets

from qmixlora.errors import UserError

FILES = {".json", ".jsonl", ".parquet"}
Rows = Iterator[tuple[str, Any]]  # (origin, sample)


def is_file(source: str) -> bool:
    """Whether a source names a data file, by its suffix."""
    return Path(source).suffix in FILES


def read_rows(source: str, split: str) -> Rows:
    """The samples of a file (.json, .jsonl, .parquet) or of anything that `datasets.load_dataset` reads.

    Raises:
        UserError: the file is missing or broken (with its line), or the data set cannot be loaded.
    """
    if not is_file(source):
        return _read_dataset(source, split)
    path = Path(source)
    if not path.is_file():
        raise UserError("There is no such data file.", where=source, fix="Check data.train and its siblings.")
    return _read_parquet(path) if path.suffix == ".parquet" else _read_json(path)


def _read_json(path: Path) -> Rows:
    """Read by line for JSON Lines, by index for a JSON list. Parsed here: errors must name a line."""
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


def _read_parquet(path: Path) -> Rows:
    try:
        data = datasets.Dataset.from_parquet(str(path))
    except Exception as error:  # datasets wraps whatever Arrow raises
        raise UserError(f"Cannot read the data file: {error}", where=str(path)) from None
    return _rows(data)


def _read_dataset(source: str, split: str) -> Rows:
    try:
        data = datasets.load_dataset(source, split=split)
    except Exception as error:  # many kinds, from many libraries
        raise UserError(
            f"Cannot load the data set: {error}", where=source, fix="Give a data file, or a data set on the hub."
        ) from None
    return _rows(data)


def _rows(data: datasets.Dataset) -> Rows:
    for name, feature in data.features.items():
        if isinstance(feature, datasets.Image):
            data = data.cast_column(name, datasets.Image(decode=False))
    return ((f"row {index}", row) for index, row in enumerate(data))
