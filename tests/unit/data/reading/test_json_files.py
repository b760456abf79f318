"""JSON is read piece by piece, strictly, and every mistake has its line."""

from __future__ import annotations

import io
import json
from typing import Any

import pytest

from qmixlora.data.reading import json_files
from qmixlora.data.reading.json_files import Row, Rows, read_json, read_json_lines
from qmixlora.errors import UserError


def values(rows: Rows) -> list[Any]:
    return [row.value if isinstance(row, Row) else str(row) for row in rows]


def listed(text: str | bytes) -> list[Any]:
    return values(read_json(io.BytesIO(text.encode() if isinstance(text, str) else text), "f"))


def lines(text: str | bytes) -> list[Any]:
    return values(read_json_lines(io.BytesIO(text.encode() if isinstance(text, str) else text), "f"))


@pytest.mark.parametrize("chunk", [1, 2, 7, 1 << 20])
def test_a_file_reads_the_same_in_pieces_of_any_size(chunk: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(json_files, "CHUNK", chunk)
    rows = [{"a": "ü\n\U0001f600"}, 123456, [1.5, None], "x", {}]
    for text in (json.dumps(rows), json.dumps(rows, ensure_ascii=False, indent=2), json.dumps({"n": 12, "rows": rows})):
        assert listed(text) == rows


@pytest.mark.parametrize("chunk", [1, 5, 1 << 20])
@pytest.mark.parametrize(
    ("text", "place"),
    [
        ('[{"a": 1}, {"b" 2}]', "line 1, column 17"),
        ('[\n{"a": 1},\n{"b" 2}\n]', "line 3, column 6"),
        ("[\n1, 2\n3]", "line 3, column 1"),
        ('{"rows": [1, 2 3]}', "line 1, column 16"),
    ],
)
def test_a_mistake_is_where_it_is_in_pieces_of_any_size(
    text: str, place: str, chunk: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(json_files, "CHUNK", chunk)
    with pytest.raises(UserError) as caught:
        listed(text)
    assert caught.value.where == f"f, {place}"


@pytest.mark.parametrize("text", ["[]", " [ ] ", '{"rows": []}'])
def test_an_empty_list_has_no_rows(text: str) -> None:
    assert listed(text) == []


def test_lines_end_at_line_feeds_alone() -> None:
    text = '{"a": "x\u2028y\x85z"}\r\n\n{"a": 2}'
    assert lines(text) == [{"a": "x\u2028y\x85z"}, {"a": 2}]


def test_a_json_file_may_hold_lines() -> None:
    assert listed('{"a": 1}\n{"a": 2}\n') == [{"a": 1}, {"a": 2}]


def test_a_byte_order_mark_is_no_text() -> None:
    assert lines(b"\xef\xbb\xbf1") == [1] and listed(b"\xef\xbb\xbf[1]") == [1]


def test_every_row_of_a_list_has_its_line() -> None:
    assert [row.where for row in read_json(io.BytesIO(b'[\n{"a":\n1},\n\n2]'), "f")] == [
        "f, line 2, row 0 (from 0)",
        "f, line 5, row 1 (from 0)",
    ]


@pytest.mark.parametrize(
    ("row", "what"),
    [
        ('{"a": 1, "b": {"c": 1, "c": 2}}', "has the key 'c' twice"),
        ('{"a": NaN}', "has NaN, which is not JSON"),
        ('{"a": -Infinity}', "has -Infinity, which is not JSON"),
    ],
)
def test_a_row_that_json_does_not_know_is_refused_and_the_others_are_read(row: str, what: str) -> None:
    for found, where in ((lines(f"1\n{row}\n3"), "f, line 2"), (listed(f"[1,\n{row},\n3]"), "f, line 2, row 1")):
        assert found[0] == 1 and found[2] == 3
        assert what in found[1] and where in found[1]


@pytest.mark.parametrize(
    "line", ["{oops}", "1 2", '{"a": 1}{"a": 2}', '{"a"', "[" * 100_000, "1" * 5000, b'"\xff"', "'a'"], ids=range(8)
)
def test_a_broken_line_is_refused_and_the_others_are_read(line: str | bytes) -> None:
    text = line if isinstance(line, bytes) else line.encode()
    found = lines(b"1\n" + text + b"\n3")
    assert found[0] == 1 and found[2] == 3 and "f, line 2" in found[1]


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", ["JSON list"]),
        ("3", ["JSON list"]),
        ('{"a": 1}', ["without a list", "['a']"]),
        ("{}", ["without a list"]),
        ('{"a": [], "b": [1]}', ["several lists, 'a', 'b'"]),
        ('{"image": "x", "conversations": [1]}', ["one sample"]),
        ('{"a": 1, "a": [2]}', ["key 'a' twice", "line 1"]),
        ('{"a": NaN, "b": [2]}', ["has NaN"]),
        ('{"a" [2]}', ["Broken JSON: expecting ':'", "line 1"]),
        ("{3: [2]}", ["expecting a key"]),
        ('[\n{"a": 1},\n{"a" 2}\n]', ["Broken JSON", "line 3"]),
        ("[1,\n2", ["ends too early", "line 2"]),
        ('[1,\n{"a": "b', ["ends too early", "line 2"]),
        ("[1,\n2 3]", ["expecting ','", "line 2"]),
        ("[1,\n]", ["Broken JSON", "line 2"]),
        ("[1]\n[2]", ["something follows the end", "line 2"]),
        ("[" * 100_000, ["nested too deeply"]),
        (b'[\n"\xe9t\xe9"]', ["not UTF-8", "line 2"]),
        ("[1]".encode("utf-16"), ["UTF-16"]),
    ],
    ids=range(19),
)
def test_a_broken_list_is_named_with_its_line(text: str | bytes, words: list[str]) -> None:
    with pytest.raises(UserError) as caught:
        listed(text)
    for word in words:
        assert word in str(caught.value)
