"""Tables of text: CSV and TSV, every cell of which is a text."""

from __future__ import annotations

import csv
from collections.abc import Callable, Iterator
from typing import Any, BinaryIO

from qmixlora.errors import UserError

from .json_files import Row, Rows, read_lines

LONGEST_FIELD = 2**31 - 1
SEPARATORS = {",": "commas", ";": "semicolons", "\t": "tabs", "|": "vertical bars"}
RETURNS = "new-line character seen"  # in what `csv` says of a carriage return alone, outside of quotes


def read_table_text(delimiter: str) -> Callable[[Any, str], Rows]:
    """A reader of CSV (RFC 4180) with this delimiter; every cell is a text."""

    def read(file: BinaryIO, name: str) -> Rows:
        csv.field_size_limit(LONGEST_FIELD)
        reader = csv.reader(_texts(file, name), delimiter=delimiter, strict=True)
        header: list[str] = []
        start = 1
        for cells in _with_ends(reader, name):
            where, start = f"{name}, line {start}", reader.line_num + 1
            if not cells:
                continue
            if not header:
                header = cells
                _check_header(header, delimiter, where)
            elif len(cells) != len(header):
                yield UserError(f"The row has {len(cells)} cells, and the table {len(header)} columns.", where=where)
            else:
                yield Row(where, dict(zip(header, cells, strict=True)))

    return read


def _check_header(header: list[str], delimiter: str, where: str) -> None:
    """Raise UserError for names of columns that say that the table is written in another way."""
    other = next((mark for mark in SEPARATORS if len(header) == 1 and mark in header[0]), None)
    if other is not None:
        raise UserError(
            f"The table has one column, {header[0]!r}: its cells seem to be separated by {SEPARATORS[other]}.",
            where=where,
            fix="Save it with commas as .csv, or with tabs as .tsv.",
        )
    led = next((column for column in header if column != column.lstrip()), None)
    if led is not None:
        raise UserError(
            f"The name of the column {led!r} begins with white space, which is part of a cell, and in which quotes do "
            "not quote.",
            where=where,
            fix=f"Save it with nothing between {SEPARATORS.get(delimiter, 'separators')} and cells.",
        )
    twice = next((column for column in header if header.count(column) > 1), None)
    if twice is not None:
        raise UserError(f"Two columns have the name {twice!r}.", where=where)


def _with_ends(reader: Any, name: str) -> Iterator[list[str]]:
    """The rows. Raises UserError where lines end in a way that `csv` does not take for an end."""
    try:
        yield from reader
    except csv.Error as error:
        if RETURNS not in str(error):
            raise
        raise UserError(
            "The lines of the table end in carriage returns alone, as old programs for the Mac write them.",
            where=f"{name}, line {reader.line_num}",
            fix="Save it anew, with line feeds.",
        ) from None


def _texts(file: BinaryIO, name: str) -> Iterator[str]:
    for _, line in read_lines(file, name):
        if isinstance(line, UserError):
            raise line
        yield line
