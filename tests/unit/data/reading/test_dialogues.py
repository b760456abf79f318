"""Speakers, their keys and the parts of what they say."""

from __future__ import annotations

from typing import Any

import pytest

from qmixlora.data.formats import IMAGE, FormatError
from qmixlora.data.reading.keys import IMAGE_FIELDS
from qmixlora.data.reading.rows import Reading, to_sample
from qmixlora.data.reading.usual import USUAL

TEXT = {"type": "text", "text": "what ?"}
ANSWER = {"role": "assistant", "content": "seven"}

ASKED = {"role": "user", "content": "what ?"}


def asking(*parts: Any, **fields: Any) -> dict[str, Any]:
    return {"messages": [{"role": "user", "content": list(parts)}, ANSWER], **fields}


@pytest.mark.parametrize("user", ["human", "user", "Human"])
@pytest.mark.parametrize("assistant", ["gpt", "assistant", "chatgpt", "model", "bot"])
@pytest.mark.parametrize("keys", [("from", "value"), ("role", "content")])
@pytest.mark.parametrize("name", ["conversations", "messages"])
def test_all_usual_speakers_and_keys_are_known(user: str, assistant: str, keys: tuple[str, str], name: str) -> None:
    said = [("system", "be brief"), (user, "hi"), (assistant, "seven")]
    sample = to_sample({name: [dict(zip(keys, turn, strict=True)) for turn in said]}, Reading())
    assert [turn["role"] for turn in sample.turns] == ["system", "user", "assistant"]
    assert [turn["text"] for turn in sample.turns] == ["be brief", "hi", "seven"]


def test_keys_that_a_table_fills_with_null_are_not_meant() -> None:
    turns = [
        {"from": "human", "value": "hi", "role": None, "content": None, "tool_calls": None},
        {"from": None, "value": None, "role": "assistant", "content": "seven", "tool_calls": []},
    ]
    assert [turn["text"] for turn in to_sample({"conversations": turns}, Reading()).turns] == ["hi", "seven"]


def test_an_answer_may_say_that_it_is_learned() -> None:
    said = {"weight": 1, "loss": True, "train": True, "train_detail": [], "loss_scale": 1.0, "reasoning_content": ""}
    turns = [{**ASKED, "weight": 0, "train": False}, {**ANSWER, **said}, ASKED, {**ANSWER, **dict.fromkeys(said)}]
    plain = [ASKED, ANSWER, ASKED, ANSWER]
    assert to_sample({"messages": turns}, Reading()) == to_sample({"messages": plain}, Reading())


@pytest.mark.parametrize("said", [{"weight": 0}, {"loss": False}, {"train": False, "loss_scale": 0.0}])
def test_an_answer_that_is_not_learned_is_part_of_the_dialogue(said: dict[str, Any]) -> None:
    sample = to_sample({"messages": [ASKED, {**ANSWER, **said}, ASKED, ANSWER]}, Reading())
    plain = to_sample({"messages": [ASKED, ANSWER, ASKED, ANSWER]}, Reading())
    assert sample == plain._replace(learned=[False, True])


def test_a_dialogue_ends_with_the_last_answer_that_is_learned() -> None:
    shown = {"role": "user", "content": [{"type": "image", "image": "b.png"}, TEXT]}
    turns = [{**ASKED, "image": "a.png"}, ANSWER, shown, {**ANSWER, "weight": 0}]
    sample = to_sample({"messages": turns, "task": ["digit", "size"]}, Reading())
    assert sample == to_sample({"messages": turns[:2], "task": "digit"}, Reading())


@pytest.mark.parametrize(
    "said", [{"loss_mask": 0}, {"trainable": False}, {"training": "no"}, {"loss_weight": 0.5}, {"mask": 0}, {"mask": 1}]
)
def test_an_answer_that_says_so_by_a_key_that_is_not_read_is_refused(said: dict[str, Any]) -> None:
    with pytest.raises(FormatError, match=f"an answer with '{next(iter(said))}', which is not read; write 'weight': 0"):
        to_sample({"messages": [ASKED, {**ANSWER, **said}, ASKED, ANSWER]}, Reading())


def test_such_keys_that_change_nothing_are_ignored() -> None:
    said = {"loss_mask": 1, "trainable": True, "loss_weight": 1.0, "training": None, "mask": {"counts": "a"}}
    turns = [{**ASKED, "loss_mask": 0, "mask": 1}, {**ANSWER, **said}]
    assert to_sample({"messages": turns}, Reading()) == to_sample({"messages": [ASKED, ANSWER]}, Reading())


UNREAD = {
    *USUAL["image"],
    "Image",
    "image_url",
    "Image Paths",
    "imagePath",
    "imgs",
    "pictures",
    "photo",
    "image-name",
    "image_1",
}


@pytest.mark.parametrize("key", sorted(UNREAD - {*IMAGE_FIELDS}))
@pytest.mark.parametrize("in_turn", [False, True])
def test_a_picture_under_a_key_that_is_not_read_is_refused(key: str, in_turn: bool) -> None:
    """A row without its picture would be learned blind."""
    turn, row = ({key: "a.png"}, {}) if in_turn else ({}, {key: "a.png"})
    with pytest.raises(FormatError, match=f"a picture in '{key}', which is not read; name it in 'image'"):
        to_sample({"messages": [{**ASKED, **turn}, ANSWER], **row}, Reading())


@pytest.mark.parametrize("value", [b"content", ["a.png"], {"url": "a.png"}, {"bytes": b"content", "path": None}])
def test_such_a_picture_may_have_any_form(value: Any) -> None:
    with pytest.raises(FormatError, match="a picture in 'img'"):
        to_sample({"messages": [{"role": "user", "content": "<image>what ?"}, ANSWER], "img": value}, Reading())


@pytest.mark.parametrize(
    "fields",
    [
        {"id": "a.png", "image_id": "7", "source": "a.png", "width": 3, "height_list": [3], "image_size": [3, 4]},
        {"img": None, "image_path": "", "image_url": [], "picture": {"bytes": None, "path": None}},
        {
            "images_file": False,
            "pictures": 2,
            "file_name": "prose.txt",
            "filename": "main.py",
            "image_caption": "a cat",
        },
    ],
)
def test_keys_that_hold_no_picture_are_ignored(fields: dict[str, Any]) -> None:
    row = {"messages": [ASKED, ANSWER]}
    assert to_sample({**row, **fields}, Reading()) == to_sample(row, Reading())


@pytest.mark.parametrize(
    "row",
    [
        {"messages": [ASKED, ANSWER], "image": "a.png"},
        {"messages": [{**ASKED, "images": ["a.png"]}, ANSWER]},
        asking({"type": "image", "image": "a.png"}, TEXT),
    ],
    ids=str,
)
def test_beside_a_picture_that_is_read_such_keys_are_about_it(row: dict[str, Any]) -> None:
    about = {"file_name": "a.png", "image_url": "http://there/a.png", "image_2": None}
    assert to_sample({**row, **about}, Reading()) == to_sample(row, Reading())


def test_a_second_picture_under_a_numbered_key_is_refused() -> None:
    """It would be left out without a word, where the first one is read."""
    row = {"messages": [{**ASKED, "images": ["a.png"]}, ANSWER], "image_2": "b.png"}
    with pytest.raises(FormatError, match="a picture in 'image_2', which is not read"):
        to_sample(row, Reading())


def test_blank_system_turns_are_left_out() -> None:
    turns = [{"role": "system", "content": ""}, {"role": "user", "content": "hi"}, ANSWER]
    assert len(to_sample({"messages": turns}, Reading()).turns) == 2


@pytest.mark.parametrize(
    "part",
    [
        {"type": "image", "image": "x.png"},
        {"type": "image", "path": "x.png"},
        {"type": "image", "url": "x.png"},
        {"type": "image", "image": {"bytes": None, "path": "x.png"}},
        {"type": "image_url", "image_url": "x.png"},
        {"type": "image_url", "image_url": {"url": "x.png", "detail": "low"}, "text": None},
    ],
    ids=str,
)
def test_a_picture_part_holds_its_source_and_its_place(part: dict[str, Any]) -> None:
    sample = to_sample(asking(TEXT, part), Reading())
    assert sample.images == ["x.png"] and sample.turns[0]["text"] == f"what ?{IMAGE}"


def test_picture_parts_without_a_source_are_the_rows_own_in_order() -> None:
    parts = {"type": "image"}, {"type": "image", "image": "b"}, TEXT, {"type": "image", "image": None}
    sample = to_sample(asking(*parts, images=["a", "c"]), Reading())
    assert sample.images == ["a", "b", "c"] and sample.turns[0]["text"] == f"{IMAGE}{IMAGE}what ?{IMAGE}"


@pytest.mark.parametrize(
    ("question", "images", "text"),
    [
        ({"content": "what ?", "images": ["a"]}, ["a"], f"{IMAGE}\nwhat ?"),
        ({"content": "what ?", "image": {"path": "a"}}, ["a"], f"{IMAGE}\nwhat ?"),
        ({"content": "", "image": "a"}, ["a"], IMAGE),
        ({"content": "is <image> <image> ?", "images": ["a", "b"]}, ["a", "b"], f"is {IMAGE} {IMAGE} ?"),
        ({"content": [{"type": "image"}, TEXT], "images": ["a"]}, ["a"], f"{IMAGE}what ?"),
        ({"content": [{"type": "image", "image": "c"}, TEXT]}, ["c"], f"{IMAGE}what ?"),
        ({"content": "what ?", "images": [], "image": None}, [], "what ?"),
    ],
    ids=str,
)
def test_pictures_of_a_turn_stand_in_it(question: dict[str, Any], images: list[str], text: str) -> None:
    turns = [ASKED, ANSWER, {"role": "user", **question}, ANSWER]
    sample = to_sample({"messages": turns}, Reading())
    assert sample.images == images and sample.turns[2]["text"] == text and sample.turns[0]["text"] == "what ?"


def test_picture_parts_name_the_rows_own_by_their_index() -> None:
    parts = {"type": "image", "index": 1}, {"type": "image", "image": "c"}, TEXT, {"type": "image", "index": 0}
    sample = to_sample(asking(*parts, images=["a", "b"]), Reading())
    assert sample.images == ["b", "c", "a"]


def test_beside_picture_parts_marks_are_text() -> None:
    sample = to_sample(asking({"type": "image"}, {"type": "text", "text": "is it <image> ?"}, images=["a"]), Reading())
    assert sample.turns[0]["text"] == f"{IMAGE}is it <image> ?"


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"messages": [{"role": "user"}]}, "without 'from' and 'value' or 'role' and 'content'"),
        ({"messages": [{"role": "user", "content": "a", "from": "gpt", "value": "b"}]}, "with both"),
        ({"messages": [{"role": "judge", "content": "a"}]}, "role 'judge'"),
        ({"messages": [{"role": ["user"], "content": "a"}]}, "a list as a role"),
        ({"messages": [{"role": "tool", "content": "a"}]}, "role 'tool'; calls of tools"),
        ({"conversations": [{"from": "observation", "value": "a"}]}, "role 'observation'; calls of tools"),
        ({"messages": [{"role": "assistant", "content": None, "tool_calls": [{"id": 1}]}]}, "has 'tool_calls'"),
        *(
            ({"messages": [ASKED, {**ANSWER, key: value}]}, f"has an answer with '{key}': {told}, but an answer")
            for key, value, told in (
                ("weight", 0.5, "0.5"),
                ("weight", 2, "2"),
                ("loss", "no", "a text"),
                ("train_detail", [{"begin_offset": 0}], "a list"),
            )
        ),
        ({"messages": [ASKED, {**ANSWER, "weight": 0, "train": True}]}, "learned and not, by 'weight' and 'train'"),
        ({"messages": [ASKED, {**ANSWER, "weight": 0}]}, "no answer that is to be learned"),
        ({"messages": [ASKED, {**ANSWER, "reasoning_content": "so"}]}, "has an answer with 'reasoning_content'"),
        (asking({"type": "audio"}), "type 'audio'; audio is not read"),
        (asking({"type": "input_audio", "input_audio": {}}), "audio is not read"),
        (asking({"type": "video", "video": "x.mp4"}), "type 'video'; video is not read"),
        (asking({"type": "file"}), "type 'file'; known are"),
        (asking({"type": ["image"]}), "known are"),
        (asking("what ?"), "a text as a part of a question"),
        (asking({"type": "text", "text": None}), "null as a part of a question"),
        (asking({"type": "image", "image": "a", "url": "b"}), "several sources, image, url"),
        (asking({"type": "image_url"}), "without a url"),
        (asking({"type": "image", "index": 1}, TEXT, images=["a"]), "the indices 1, and 1 images, which count from 0"),
        (asking({"type": "image", "index": 0}, {"type": "image"}, images=["a", "b"]), "the indices 0, none, and 2"),
        (asking(*[{"type": "image", "index": 0}] * 2, images=["a", "b"]), "the indices 0, 0, and 2 images"),
        (asking(*[{"type": "image", "index": 0}] * 2, images=["a"]), "2 picture parts without a source, and 1 images"),
        (asking({"type": "image", "index": "0"}, images=["a"]), "a text as the index of a picture part"),
        ({"messages": [{**ASKED, "image": "a", "images": ["b"]}, ANSWER]}, "both 'image' and 'images'"),
        ({"messages": [{**ASKED, "images": ["a"]}, ANSWER], "image": "b"}, "0 picture parts without a source, and 1"),
        ({"messages": [{"role": "user", "content": "<image>", "images": ["a", "b"]}, ANSWER]}, "1 <image> marks and 2"),
        ({"messages": [ASKED, {**ANSWER, "images": ["a"]}]}, "a picture in a turn that is not the user's"),
        ({"messages": [ASKED, {"role": "assistant", "content": "a", "videos": ["b"]}]}, "video is not read"),
        (asking({"type": "image"}, TEXT), "1 picture parts without a source, and 0 images"),
        (
            asking({"type": "image", "image": "a"}, TEXT, image="a"),
            "0 picture parts without a source, and 1 images",
        ),
        (asking({"type": "image"}, {"type": "text", "text": "<image>\nx"}, image="a"), "marks and 1 images in parts"),
        ({"messages": [ASKED, {"role": "assistant", "content": [{"type": "image", "image": "a"}]}]}, "not the user's"),
    ],
    ids=str,
)
def test_a_bad_dialogue_says_what_is_wrong(row: dict[str, Any], message: str) -> None:
    with pytest.raises(FormatError, match=message):
        to_sample(row, Reading())
