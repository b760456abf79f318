"""What the columns of a table say as a whole, and no row alone: names that none has, and answers that hardly mean what
they are read as.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from string import ascii_uppercase
from typing import Any

from qmixlora.data.formats import FormatError
from qmixlora.errors import UserError
from qmixlora.recipe import Columns

from .columns import answers_of, listed_answers, named_by, number_in, optional, options_of
from .json_files import Row, Rows
from .texts import is_blank, written

FEW = 20  # answers that may lack a number, or a form, by chance
EXAMPLES, LONGEST = 3, 40  # that are named, and characters of one
NUMBER = re.compile(r"[-+]?\d+(\.\d+)?")


@dataclass
class Some:
    """So many texts, the first different ones kept as examples."""

    count: int = 0
    examples: dict[str, None] = field(default_factory=dict)

    def add(self, text: str) -> None:
        self.count += 1
        if len(self.examples) <= EXAMPLES:
            self.examples[text[:LONGEST]] = None

    def __str__(self) -> str:
        named = list(map(repr, self.examples))
        return ", ".join(named[:EXAMPLES]) + (", ..." if len(named) > EXAMPLES else "")


def list_answers(rows: Rows, column: str) -> bool:
    """Whether all answers of a table that are not blank are texts that list answers, as a table of texts holds them."""
    answers = (row.value.get(column) for row in rows if isinstance(row, Row) and isinstance(row.value, Mapping))
    lists = (listed_answers(one) for one in answers if not is_blank(one))
    return next(lists, None) is not None and all(one is not None for one in lists)


class WholeColumns:
    """What has been seen of the columns that a recipe names, in the rows that were let through."""

    def __init__(self, columns: Columns, source: str, are_lists: bool = False) -> None:
        """`are_lists` says that answers are texts that list answers (`list_answers`), and are to be read so."""
        self.columns, self.source, self._are_lists = columns, source, are_lists
        self._missing, self._have = optional(columns), dict[str, None]()
        self._named_by, self._others = Counter[str](), Some()  # how answers name options; those that do not
        self._numbers, self._is_beyond, self._fewest = Counter[int](), False, len(ascii_uppercase)
        self._answers, self._listed = 0, Some()  # of all answers, those that are texts which list answers
        self._whole, self._is_whole = Some(), True  # numbers such as 2.0, and whether there are no others

    def let_through(self, rows: Rows) -> Rows:
        """The rows. Raises UserError after them for a column that none has, and for options that are counted from 1."""
        for row in rows:
            if isinstance(row, Row) and isinstance(row.value, Mapping):
                row = Row(row.where, self._with_answers(row.value))
                if self._missing:
                    self._missing -= row.value.keys()
                    self._have |= dict.fromkeys(map(str, row.value))
                self._see(row.value)
            yield row
        if self._missing and self._have:
            what = f"No row has the column {min(self._missing)!r}, which data.columns names."
            raise UserError(what, where=self.source, fix=f"The columns are {', '.join(map(repr, self._have))}.")
        self._check_counted_from_0()

    def doubts(self) -> list[str]:
        """What is likely a mistake in the answers that were let through, each with what to do."""
        told, inside = [], self._named_by.total()
        if self._listed.count:
            of = f"{self._listed.count} of {self._answers}"
            what = f"{of} answers are lists of texts, written as a text ({self._listed})"
            told.append(
                f"{what}, and are read as several right answers, one of which is learned: if the list is the answer, "
                "write the rows as dialogues."
                if self._are_lists
                else f"{what}, and are learned as they stand: if several answers are right, write all rows so."
            )
        if inside and self._others.count:
            told.append(
                f"{self._others.count} of {inside + self._others.count} answers are none of their options, by letter, "
                f"text or number ({self._others}), and are learned as they stand: write them like the others."
            )
        if self._named_by["letter"] and self._named_by["text"]:
            told.append(
                f"{self._named_by['letter']} answers name an option by its letter and {self._named_by['text']} by its "
                "text: write all of them alike."
            )
        if self._whole.count and self._is_whole:
            told.append(
                f"{self._whole.count} answers are whole numbers written as decimals ({self._whole}), and are learned "
                "so. pandas makes such a column of integers that lacks one: save it as integers "
                '(`astype("Int64")`).'
            )
        return told

    def _with_answers(self, row: Mapping[str, Any]) -> Mapping[str, Any]:
        """A row, its answers as a list where the table has them as texts."""
        value = row.get(self.columns.answer)
        if is_blank(value):
            return row
        self._answers += 1
        listed = listed_answers(value)
        if listed is None:
            return row
        self._listed.add(str(value))
        return {**row, self.columns.answer: listed} if self._are_lists else row

    def _see(self, row: Mapping[str, Any]) -> None:
        try:
            options = options_of(row, self.columns)
            texts = [written(answer, "an answer") for answer in answers_of(row, self.columns)]
        except FormatError:  # told of the row
            return
        for text in texts:
            if options:
                self._see_choice(text.strip(), options)
            elif NUMBER.fullmatch(text) and text.endswith(".0"):
                self._whole.add(text)
            elif NUMBER.fullmatch(text):
                self._is_whole = False

    def _see_choice(self, text: str, options: list[str]) -> None:
        by, number = named_by(text, options), number_in(text)
        if by is None:
            self._others.add(text)
            return
        self._named_by[by] += 1
        if by == "number" and number is not None:
            self._numbers[number] += 1
            self._is_beyond |= number == len(options)
            self._fewest = min(self._fewest, len(options))

    def _check_counted_from_0(self) -> None:
        """Raise UserError for numbers of options that leave out 0, if one is beyond its options or chance cannot be."""
        count, several = self._numbers.total(), len(self._numbers) > 1 and self._fewest > 2
        if not count or self._numbers[0] or not (self._is_beyond or (several and count >= FEW)):
            return
        raise UserError(
            f"Options are counted from 0, and of {count} answers that are an option's number none is 0, so that they "
            "seem to be counted from 1.",
            where=self.source,
            fix="Lower each by one, or write letters (A, B, ...) in place of numbers.",
        )
