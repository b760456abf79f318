"""Tables of text: what is not what it seems is refused with its line."""

from __future__ import annotations

from pathlib import Path

import pytest

from qmixlora.errors import UserError

from .test_sources import rows_of, saved


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("a,a\n1,2\n", ["Two columns have the name 'a'", "line 1"]),
        ('a,b\n1,2\n1,"2\n', ["quote", "line 3"]),
        ('a,b\n1,2\n"What" is it?,red\n', ["quote", "line 3", '"""What"" is it?"']),
        ('a,b\n1,"2\n3,4\n5","6" 7\n', ["quote", "lines 2 to 4"]),
        ("sep=,\na,b,c\n1,2,3\n", ["line 1", "has 2 cells", "each of the 2 rows below it 3", "Remove"]),
        ("# by me\na,b,c\n1,2,3\n", ["line 1", "has 1 cells", "Remove"]),
        ("a,b\n1,\udce9\n", ["not UTF-8", "line 2"]),
        ("a;b\n1;2\n", ["separated by semicolons", "'a;b'", "line 1"]),
        ("a\tb\n1\t2\n", ["separated by tabs", "line 1"]),
        ('a, b\n1, "2"\n', ["' b'", "white space", "line 1"]),
        ("a,b\r1,2\r", ["carriage returns alone", "line 1"]),
    ],
)
def test_a_broken_table_is_named_with_its_line(text: str, words: list[str], tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_bytes(text.encode(errors="surrogateescape"))
    with pytest.raises(UserError) as caught:
        rows_of(tmp_path / "a.csv")
    for word in words:
        assert word in str(caught.value)


def test_a_row_with_other_cells_than_the_table_is_refused_and_the_others_are_read(tmp_path: Path) -> None:
    found = rows_of(saved(tmp_path / "a.csv", 'a,b\n"1\n",2\n1\n3,4\n'))
    assert found[0] == {"a": "1\n", "b": "2"} and found[2] == {"a": "3", "b": "4"}
    assert "1 cells, and the table 2 columns" in str(found[1]) and "line 4" in str(found[1])


@pytest.mark.parametrize(
    ("rows", "merged"),
    [
        (['"Is it red?\tyes\t1.png', 'Is it blue?"\tno\t2.png'], "line 2"),
        (["Is it?\tyes\t1.png", 'Is it?\t"yes\t1.png', "Is it?\tyes\t2.png", 'Is it?\tno"\t3.png'], "line 3"),
    ],
)
def test_rows_that_quotes_have_joined_are_refused(rows: list[str], merged: str, tmp_path: Path) -> None:
    """A table that was written without quoting has them at the beginnings and ends of cells by chance."""
    found = rows_of(saved(tmp_path / "a.tsv", "\n".join(["q\ta\timage", *rows, "So?\tyes\t4.png", ""])))
    assert "quotes" in str(found[-2]) and merged in str(found[-2]) and found[-1]["q"] == "So?"


def test_cells_may_hold_lines_and_separators(tmp_path: Path) -> None:
    cells = ["one, two\nthree", "a\tb\nc\td\te", "\n\n", "a\tb"]
    for name, separator in (("a.csv", ","), ("a.tsv", "\t")):
        lines = [separator.join(["q", "a"]), *(separator.join([f'"{cell}"', "x"]) for cell in cells)]
        assert [row["q"] for row in rows_of(saved(tmp_path / name, "\n".join(lines)))] == cells


def test_one_row_of_another_length_says_nothing_of_the_names(tmp_path: Path) -> None:
    assert "3 cells" in str(rows_of(saved(tmp_path / "a.csv", "a,b\n1,2,3\n"))[0])
    assert rows_of(saved(tmp_path / "a.csv", "a,b\n1,2,3\n4,5\n"))[1] == {"a": "4", "b": "5"}
