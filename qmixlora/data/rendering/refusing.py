"""What a sample is refused with: which one it is, and that it is too long."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from qmixlora.data.formats import sample_name
from qmixlora.errors import UserError


def check_length(length: int, max_length: int) -> None:
    """Raise UserError for a sample of more tokens than `max_length`."""
    if length > max_length:
        raise UserError(
            f"A sample has {length} tokens, over data.max_length, {max_length}; samples are never cut.",
            fix="Raise data.max_length or remove the sample.",
        )


@contextmanager
def naming(row: Mapping[str, Any]) -> Iterator[None]:
    """Name the row in errors of a block that have no place yet."""
    try:
        yield
    except UserError as error:
        raise UserError(error.what, where=error.where or sample_name(row), fix=error.fix) from error
