"""Values of typed columns (Parquet, data sets) as they are meant: names of classes, numbers as they were written."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import datasets
import numpy
import pyarrow

Meant = Callable[[Any], Any]  # what Arrow gives as Python's value -> what it is in a row
SHORT = {pyarrow.float16(): numpy.float16, pyarrow.float32(): numpy.float32}


def meant_by(schema: pyarrow.Schema) -> Meant:
    """What rows (objects) with this schema mean, nested values too.

    A number of a class (`ClassLabel`) is its name, by what `datasets` has written into the schema; null without one. A
    number of less than 64 bits is the shortest that is the same in its own type: 0.1, where Python widens it to
    0.10000000149011612.
    """
    features = datasets.Features.from_arrow_schema(schema) if b"huggingface" in (schema.metadata or {}) else {}
    return _struct(schema, features) or (lambda row: row)


def _meaning(kind: pyarrow.DataType, feature: Any) -> Meant | None:
    """What values of a type mean; None for what they are already. `feature` is that of `datasets`, if there is one."""
    if isinstance(feature, datasets.ClassLabel):
        names = feature.names
        if names == [str(number) for number in range(len(names))]:  # which may count options
            return None
        return lambda number: names[number] if 0 <= number < len(names) else None
    if kind in SHORT:
        own = SHORT[kind]
        return lambda number: float(str(own(number)))
    if pyarrow.types.is_struct(kind):
        return _struct(kind, feature)
    if pyarrow.types.is_list(kind) or pyarrow.types.is_large_list(kind) or pyarrow.types.is_fixed_size_list(kind):
        inner = feature[0] if isinstance(feature, list) else getattr(feature, "feature", None)
        return _each(_meaning(kind.value_type, inner))
    return None


def _struct(fields: Any, feature: Any) -> Meant | None:
    features = feature if isinstance(feature, Mapping) else {}
    found = {field.name: _meaning(field.type, features.get(field.name)) for field in fields}
    meant = {name: meaning for name, meaning in found.items() if meaning is not None}

    def read(row: dict[str, Any]) -> dict[str, Any]:
        return row | {name: meaning(row[name]) for name, meaning in meant.items() if row[name] is not None}

    return read if meant else None


def _each(meaning: Meant | None) -> Meant | None:
    if meaning is None:
        return None
    return lambda values: [None if value is None else meaning(value) for value in values]
