"""The one form: where an image stands is nothing that a text can say."""

from __future__ import annotations

import pytest

from qmixlora.data.formats import IMAGE, question_about, to_messages


def test_messages_put_the_image_where_its_mark_stands() -> None:
    content = to_messages([{"role": "user", "text": f"look {IMAGE} here"}])[0]["content"]
    assert [part["type"] for part in content] == ["text", "image", "text"]


@pytest.mark.parametrize(
    ("text", "parts"),
    [
        ("Is <> red and\n<>\n blue? ", ["Is ", None, " red and\n", None, "\n blue? "]),
        ("<>\nwhat ?", [None, "what ?"]),
        ("<> what ?", [None, "what ?"]),
        ("<> <>\nwhat ?\n<>", [None, None, "what ?", None]),
        ("<>\n\n    if x:\n        y\n", [None, "    if x:\n        y\n"]),
        ("    if x:\n        y\n<>", ["    if x:\n        y", None]),
        ("a <> <> b", ["a ", None, None, " b"]),
        ("\n a  b \n", ["\n a  b \n"]),
        ("<>", [None]),
    ],
)
def test_white_space_stays_but_beside_images_before_or_behind_all_words(text: str, parts: list[str | None]) -> None:
    content = to_messages([{"role": "user", "text": text.replace("<>", IMAGE)}])[0]["content"]
    assert [part.get("text") for part in content] == parts


def test_the_words_for_an_image_are_text() -> None:
    content = to_messages([{"role": "assistant", "text": "write <image> there"}])[0]["content"]
    assert content == [{"type": "text", "text": "write <image> there"}]


def test_a_question_about_images_begins_with_them() -> None:
    row = question_about([{"path": "a", "bytes": None}] * 2, "what ?")
    assert row["turns"][0]["text"] == f"{IMAGE}{IMAGE}\nwhat ?" and row["turns"][1]["text"] == ""
