"""Samples of every format become the same turns, images and task; a bad sample says what is wrong."""

from __future__ import annotations

from typing import Any

import pytest

from qmixlora.data.formats import FormatError, to_conversation, to_messages

from .helpers import GPT, HUMAN

SPOKEN = {"conversations": [{"from": "human", "value": "hi"}, GPT]}
VISION_FLAN = "PlotQA+visual_question_answering"


@pytest.mark.parametrize(
    ("fields", "task_field", "task"),
    [
        ({"task": "a", "task_name": "b"}, None, "a"),
        ({"task_name": VISION_FLAN}, None, VISION_FLAN),
        ({"task": "a", "set": "b"}, "set", "b"),
        ({}, None, "all"),
    ],
)
def test_the_task_comes_from_task_task_name_or_the_field_that_the_recipe_names(
    fields: dict[str, str], task_field: str | None, task: str
) -> None:
    assert to_conversation({**SPOKEN, **fields}, task_field)[2] == task


def test_a_task_field_that_a_sample_lacks_is_named() -> None:
    with pytest.raises(FormatError, match="no field 'set'"):
        to_conversation(SPOKEN, "set")


def test_an_image_without_a_mark_belongs_to_the_first_question() -> None:
    row = {"image": "x.png", "conversations": [{"from": "human", "value": "what ?"}, GPT]}
    turns, images, _ = to_conversation(row)
    assert turns[0]["text"] == "<image>\nwhat ?" and images == ["x.png"]


def test_messages_put_the_image_where_its_mark_stands() -> None:
    content = to_messages([{"role": "user", "text": "look <image> here"}])[0]["content"]
    assert content == [{"type": "text", "text": "look"}, {"type": "image"}, {"type": "text", "text": "here"}]


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"text": "x"}, "neither 'conversations' nor 'messages'"),
        ({"conversations": [HUMAN]}, "no answer"),
        ({"conversations": [HUMAN, {"from": "bot", "value": "x"}]}, "role 'bot'"),
        ({"conversations": [{"from": "human"}, GPT]}, "without 'from' and 'value'"),
        ({"conversations": [HUMAN, GPT]}, "1 <image> marks and 0 images"),
        ({"image": ["a", "b"], "conversations": [HUMAN, GPT]}, "1 <image> marks and 2 images"),
        ({"messages": [{"role": "user"}]}, "without 'role' and 'content'"),
        ({"messages": [{"role": "user", "content": [{"type": "audio"}]}]}, "type 'audio'"),
    ],
)
def test_a_bad_sample_says_what_is_wrong(row: dict[str, Any], message: str) -> None:
    with pytest.raises(FormatError, match=message):
        to_conversation(row)
