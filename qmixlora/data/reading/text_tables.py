"""Tables of text: CSV and TSV, every cell of which is a text."""

from __future__ import annotations

import csv
from collections.abc import Callable, Iterator
from itertools import chain, islice
from typing import Any, BinaryIO

from qmixlora.errors import UserError

from .json_files import Row, Rows, read_lines

LONGEST_FIELD = 2**31 - 1
FIRST = 100  # rows below the line of names that are compared with it
PROSE = {",", ";"}  # separators that lines of a cell have anyway
SEPARATORS = {",": "commas", ";": "semicolons", "\t": "tabs", "|": "vertical bars"}
RETURNS = "new-line character seen"  # in what `csv` says of a carriage return alone, outside of quotes


def read_table_text(delimiter: str) -> Callable[[Any, str], Rows]:
    """A reader of CSV (RFC 4180) with this delimiter; every cell is a text."""

    def read(file: BinaryIO, name: str) -> Rows:
        csv.field_size_limit(LONGEST_FIELD)
        rows = _with_places(csv.reader(_texts(file, name), delimiter=delimiter, strict=True), name)
        for above, header in islice(rows, 1):
            _check_header(header, delimiter, above)
            first = list(islice(rows, FIRST))
            _check_names(header, [len(cells) for _, cells in first], above)
            for where, cells in chain(first, rows):
                problem = _problem(cells, len(header), delimiter)
                yield UserError(problem, where=where) if problem else Row(where, dict(zip(header, cells, strict=True)))

    return read


def _problem(cells: list[str], columns: int, delimiter: str) -> str | None:
    """Why a row cannot be read."""
    if len(cells) != columns:
        return f"The row has {len(cells)} cells, and the table {columns} columns."
    if delimiter in PROSE or not any(_is_joined(cell, at, columns, delimiter) for at, cell in enumerate(cells)):
        return None
    return (
        "The row seems to be several, joined by quotes at the beginning of a cell and at the end of a later one: write "
        "quotes around such a cell, and those in it twice."
    )


def _is_joined(cell: str, at: int, columns: int, delimiter: str) -> bool:
    """Whether a cell has as many separators in its lines as rows that begin and end in this column."""
    if "\n" not in cell or columns == 1:
        return False
    counts = [line.count(delimiter) for line in cell.split("\n")]
    return counts == [columns - 1 - at, *[columns - 1] * (len(counts) - 2), at]


def _check_names(header: list[str], lengths: list[int], where: str) -> None:
    """Raise UserError where the rows below the first line agree on another number of cells than it has."""
    if len(lengths) > 1 and len({*lengths}) == 1 and lengths[0] != len(header):
        raise UserError(
            f"The line has {len(header)} cells, and each of the {len(lengths)} rows below it {lengths[0]}, so that it "
            "does not have the names of the columns.",
            where=where,
            fix="Remove what stands above the line with the names, or name every column.",
        )


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


def _with_places(reader: Any, name: str) -> Iterator[tuple[str, list[str]]]:
    """The rows that are not empty, each with its place. Raises UserError where lines end in a way that `csv` does not
    take for an end, and for quotes that do not go round a cell.
    """
    start = 1
    try:
        for cells in reader:
            where, start = f"{name}, line {start}", reader.line_num + 1
            if cells:
                yield where, cells
    except csv.Error as error:
        if RETURNS in str(error):
            raise UserError(
                "The lines of the table end in carriage returns alone, as old programs for the Mac write them.",
                where=f"{name}, line {reader.line_num}",
                fix="Save it anew, with line feeds.",
            ) from None
        lines = f"line {start}" if reader.line_num <= start else f"lines {start} to {reader.line_num}"
        raise UserError(
            f"A cell begins with a quote, which does not end with it ({error}).",
            where=f"{name}, {lines}",
            fix='Such a cell is quoted: write quotes in it twice, and quotes around it, as in """What"" is it?".',
        ) from None


def _texts(file: BinaryIO, name: str) -> Iterator[str]:
    for _, line in read_lines(file, name):
        if isinstance(line, UserError):
            raise line
        yield line
