"""JSON files, read sample by sample: lists, objects with one list, and JSON Lines.

Parsed here and not by a library, since errors must name a line and a file must not lie in memory as objects.
"""

from __future__ import annotations

import codecs
import json
from collections.abc import Iterator
from typing import Any, BinaryIO, NamedTuple

from qmixlora.errors import UserError

CHUNK = 1 << 20  # bytes at a time
BROKEN = "Correct that line."


class Row(NamedTuple):
    """A sample as its source has it; `where` names the file and the line or row."""

    where: str
    value: Any


Rows = Iterator[Row | UserError]  # an error stands for one sample that cannot be read


class Decoder:
    """Python's JSON decoder, strict: what JSON does not know, or has two meanings, is refused when the value ends."""

    def __init__(self) -> None:
        self.problems: list[str] = []
        self._decoder = json.JSONDecoder(object_pairs_hook=self._object, parse_constant=self._constant)

    def value_at(self, text: str, start: int) -> tuple[Any, int]:
        """A value, and where it ends; what is wrong in it is in `problems`. Raises ValueError for broken JSON."""
        self.problems.clear()
        try:
            return self._decoder.raw_decode(text, start)
        except RecursionError:
            raise ValueError("nested too deeply") from None

    def _object(self, pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        found = dict(pairs)
        if len(found) != len(pairs):
            keys = [key for key, _ in pairs]
            self.problems.append(f"has the key {next(key for key in keys if keys.count(key) > 1)!r} twice")
        return found

    def _constant(self, word: str) -> None:
        self.problems.append(f"has {word}, which is not JSON")


def read_lines(file: BinaryIO, name: str) -> Iterator[tuple[int, str | UserError]]:
    r"""Numbered lines of a UTF-8 file with their ends, which are `\n` alone; an error for one that is not UTF-8."""
    for number, line in enumerate(file, start=1):
        try:
            yield number, line.decode("utf-8-sig" if number == 1 else "utf-8")
        except UnicodeDecodeError as error:
            yield number, not_utf8(error, line, f"{name}, line {number}")


def not_utf8(error: UnicodeDecodeError, beginning: bytes, where: str) -> UserError:
    """The mistake of another encoding."""
    is_utf16 = beginning.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE))
    why = "UTF-16" if is_utf16 else f"{error.reason}, byte {error.object[error.start]:#x}"
    return UserError(f"It is not UTF-8: {why}.", where=where, fix="Save the file as UTF-8.")


def read_json_lines(file: BinaryIO, name: str) -> Rows:
    """One value for each line that is not blank."""
    decoder = Decoder()
    for number, line in read_lines(file, name):
        where = f"{name}, line {number}"
        if isinstance(line, UserError):
            yield line
        elif line.strip():
            yield _row_of_line(decoder, line.strip(" \t\r\n"), where)


def _row_of_line(decoder: Decoder, line: str, where: str) -> Row | UserError:
    try:
        value, end = decoder.value_at(line, 0)
        if end < len(line):
            raise json.JSONDecodeError("more than one value in a line", line, end)
    except json.JSONDecodeError as error:
        return UserError(f"Broken JSON: {error.msg}.", where=f"{where}, column {error.colno}", fix=BROKEN)
    except ValueError as error:
        return UserError(f"Broken JSON: {error}.", where=where, fix=BROKEN)
    if decoder.problems:
        return UserError(f"The sample {decoder.problems[0]}.", where=where)
    return Row(where, value)


def read_json(file: BinaryIO, name: str) -> Rows:
    """The values of a list, or of the one list in an object; lines, if a first line is an object and more follow."""
    stream = _Stream(file, name)
    first = stream.peek()
    if first == "[":
        yield from _values(stream)
    elif first == "{" and stream.is_lines():
        file.seek(0)
        yield from read_json_lines(file, name)
        return
    elif first == "{":
        yield from _list_in_object(stream)
    else:
        raise UserError("A data file is a JSON list of samples.", where=name, fix="Or use .jsonl, one per line.")
    if stream.peek():
        raise stream.broken("something follows the end")


def _values(stream: _Stream) -> Rows:
    stream.take("[")
    for index in range(1 << 62):
        if index == 0 and stream.peek() == "]":
            break
        if index and not stream.goes_on("]"):
            return
        stream.peek()
        where = f"{stream.name}, line {stream.line}, row {index} (from 0)"
        value = stream.value()
        problems = stream.decoder.problems
        yield UserError(f"The sample {problems[0]}.", where=where) if problems else Row(where, value)
    stream.take("]")


def _list_in_object(stream: _Stream) -> Rows:
    keys: set[str] = set()
    lists: list[str] = []
    stream.take("{")
    while stream.goes_on("}") if keys else stream.peek() != "}":
        if stream.peek() != '"':
            raise stream.broken("expecting a key in double quotes")
        key = stream.value()
        stream.take(":")
        if key in keys:
            raise UserError(f"The file has the key {key!r} twice.", where=stream.where())
        keys.add(key)
        if stream.peek() != "[":
            stream.value()
            if stream.decoder.problems:
                raise UserError(f"The file {stream.decoder.problems[0]}.", where=stream.where())
            continue
        lists.append(key)
        if len(lists) > 1 or key in {"conversations", "messages"}:
            what = "is one sample" if len(lists) == 1 else f"has several lists, {', '.join(map(repr, lists))}"
            raise UserError(f"A data file is a JSON list of samples; this one {what}.", where=stream.name)
        yield from _values(stream)
    if not keys:
        stream.take("}")
    if not lists:
        raise UserError(
            f"A data file is a JSON list of samples; this is an object without a list, its keys are {sorted(keys)}.",
            where=stream.name,
            fix="Put samples into [ ], or use .jsonl, one per line.",
        )


class _Stream:
    """A UTF-8 file of JSON, of which little more than one value is in memory at a time."""

    def __init__(self, file: BinaryIO, name: str) -> None:
        self.file, self.name, self.decoder = file, name, Decoder()
        self.text, self.at, self.line = "", 0, 1
        self._utf8 = codecs.getincrementaldecoder("utf-8-sig")()
        self._newlines = 0
        self._left_of_text = 0  # characters of the first line in `text` that are no longer there

    def where(self) -> str:
        return f"{self.name}, line {self.line}"

    def peek(self) -> str:
        """The next character that is no white space; nothing at the end."""
        while True:
            start = self.at
            while self.at < len(self.text) and self.text[self.at] in " \t\r\n":
                self.at += 1
            self.line += self.text.count("\n", start, self.at)
            if self.at < len(self.text):
                return self.text[self.at]
            if not self._more():
                return ""

    def take(self, character: str) -> None:
        """Go past a character that must come next."""
        if self.peek() != character:
            raise self.broken(f"expecting {character!r}")
        self.at += 1

    def goes_on(self, end: str) -> bool:
        """Go past a comma (true) or past the end of a list or an object."""
        following = self.peek()
        if following not in {",", end}:
            raise self.broken(f"expecting ',' or {end!r}" + " (the file ends too early)" * (not following))
        self.at += 1
        return following == ","

    def value(self) -> Any:
        """Go past a value and return it; `decoder.problems` says what is wrong in it."""
        self.peek()
        while True:
            try:
                value, end = self.decoder.value_at(self.text, self.at)
            except ValueError as error:
                if not self._more():
                    raise self._broken_value(error) from None
                continue
            if end == len(self.text) and self._more():  # it may be the beginning of a longer number
                continue
            self.line += self.text.count("\n", self.at, end)
            self.at = end
            return value

    def is_lines(self) -> bool:
        """Whether the first line is a whole object and is not the only one. Asked before anything is taken."""
        end = self.text.find("\n", self.at)
        line = self.text[self.at : end].rstrip()
        if end < 0 or not self.text[end:].strip():
            return False
        try:
            return self.decoder.value_at(line, 0)[1] == len(line)
        except ValueError:
            return False

    def broken(self, what: str) -> UserError:
        """The mistake of JSON that is broken here."""
        return self._broken_at(self.at, what)

    def _broken_value(self, error: ValueError) -> UserError:
        if not isinstance(error, json.JSONDecodeError):
            return self._broken_at(self.at, str(error))
        ends = error.msg.startswith("Unterminated") or not self.text[error.pos :].strip()
        return self._broken_at(error.pos, error.msg + " (the file ends too early)" * ends)

    def _broken_at(self, position: int, what: str) -> UserError:
        line = self.line + self.text.count("\n", self.at, position)
        start = self.text.rfind("\n", 0, position)
        column = position - start if start >= 0 else position + 1 + self._left_of_text
        return UserError(f"Broken JSON: {what}.", where=f"{self.name}, line {line}, column {column}", fix=BROKEN)

    def _more(self) -> bool:
        """Read on: as much as there is unread text, at least a chunk. False at the end of the file."""
        chunk = self.file.read(max(CHUNK, len(self.text) - self.at))
        try:
            text = self._utf8.decode(chunk, final=not chunk)
        except UnicodeDecodeError as error:
            line = 1 + self._newlines + chunk.count(b"\n", 0, error.start)
            raise not_utf8(error, chunk, f"{self.name}, line {line}") from None
        if chunk:
            start = self.text.rfind("\n", 0, self.at)
            self._left_of_text = self.at - start - 1 if start >= 0 else self._left_of_text + self.at
            self.text, self.at = self.text[self.at :] + text, 0
            self._newlines += chunk.count(b"\n")
        return bool(chunk)
