"""A row of any format becomes turns, images, a task and references, or says why not."""

from __future__ import annotations

import re
from typing import Any

import pytest

from qmixlora.data.formats import IMAGE, FormatError
from qmixlora.data.reading.rows import Reading, to_sample

from ..helpers import GPT, HUMAN

HI = {"from": "human", "value": "hi"}
SYSTEM = {"from": "system", "value": "be brief"}
SPOKEN = {"conversations": [HI, GPT]}
VISION_FLAN = "PlotQA+visual_question_answering"


def says(value: Any, role: str = "human") -> dict[str, Any]:
    return {"from": role, "value": value}


def answered(value: Any) -> dict[str, Any]:
    return {"conversations": [HI, says(value, "gpt")]}


@pytest.mark.parametrize(
    ("fields", "task_field", "task"),
    [
        ({"task": "a", "task_name": "b"}, None, "a"),
        ({"task_name": VISION_FLAN}, None, VISION_FLAN),
        ({"task": None, "task_name": "b"}, None, "b"),
        ({"task": "a", "set": "b"}, "set", "b"),
        ({"task": 0}, None, "0"),
        ({"set": 0}, "set", "0"),
        ({"task": None}, None, "all"),
        ({"task": ""}, None, "all"),
        ({"task": "\u200b", "task_name": "b"}, None, "b"),
        ({}, None, "all"),
    ],
)
def test_the_task_comes_from_task_task_name_or_the_field_that_the_recipe_names(
    fields: dict[str, Any], task_field: str | None, task: str
) -> None:
    assert to_sample({**SPOKEN, **fields}, Reading(task_field)).task == task


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({}, "no field 'set'"),
        ({"set": None}, "has null as the task in 'set'"),
        ({"set": ["a", "b"]}, "has 2 tasks in the task in 'set' and 1 answers"),
        ({"set": {"a": 1}}, "has an object as the task"),
        ({"set": True}, "has true as the task"),
        ({"set": " "}, "nothing but white space as the task"),
    ],
)
def test_a_task_that_is_no_name_is_refused(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(FormatError, match=message):
        to_sample({**SPOKEN, **fields}, Reading("set"))


def asked(*answers: dict[str, Any], **fields: Any) -> dict[str, Any]:
    """A row with these keys in its answers, and these beside them."""
    turns = [turn for own in answers for turn in (HI, {**says("so", "gpt"), **own})]
    return {"conversations": turns, **fields}


@pytest.mark.parametrize(
    ("row", "task", "tasks"),
    [
        (asked({"task": "a"}, {"task": "b"}), "b", ["a", "b"]),
        (asked({"task": "a"}, {}, task="b"), "b", ["a", "b"]),
        (asked({"task": None}, {"task": "a"}, task_name="b"), "a", ["b", "a"]),
        (asked({}, {}, task=["a", "b"]), "b", ["a", "b"]),
        (asked({}, {}, task=["a", 1]), "1", ["a", "1"]),
        (asked({"task": "a"}, {"task": "a"}), "a", []),
        (asked({}, {}, task="a"), "a", []),
        (asked({}, task=["a"]), "a", []),
        (asked({}, {}), "all", []),
    ],
)
def test_answers_may_have_tasks_of_their_own(row: dict[str, Any], task: str, tasks: list[str]) -> None:
    sample = to_sample(row, Reading())
    assert sample.task == task and sample.tasks == tasks


@pytest.mark.parametrize(
    ("row", "message"),
    [
        (asked({"task": "a"}, {}), "answers with a task and answers without"),
        (asked({}, {}, task=["a"]), "has 1 tasks in the task in 'task' and 2 answers"),
        (asked({}, {}, task=[]), "has 0 tasks in the task in 'task' and 2 answers"),
        (asked({}, {}, task=["a", None]), "has null as the task in 'task'"),
        (asked({}, {}, task=["a", " "]), "nothing but white space as the task"),
        (
            asked({"task": "a"}, {}, task=["a", "b"]),
            "has a list as the task in 'task', and answers that name their own",
        ),
        (asked({"task": ["a"]}), "has a list as the task of an answer"),
        (asked({"task": ""}), "has nothing as the task of an answer"),
        ({"conversations": [{**HI, "task": "a"}, says("so", "gpt")]}, "has a task in a turn of the user"),
        (asked({}, {}, task={"a": 1}), "has an object as the task"),
    ],
)
def test_tasks_of_answers_that_have_not_one_meaning_are_refused(row: dict[str, Any], message: str) -> None:
    with pytest.raises(FormatError, match=re.escape(message)):
        to_sample(row, Reading())


@pytest.mark.parametrize("field", ["system", "system_prompt"])
def test_the_systems_words_may_stand_beside_a_dialogue(field: str) -> None:
    said = {"conversations": [SYSTEM, HI, GPT]}
    assert to_sample({**SPOKEN, field: "be brief"}, Reading()) == to_sample(said, Reading())
    assert to_sample({**said, field: "be brief"}, Reading()) == to_sample(said, Reading())


def text_of(row: dict[str, Any], turn: int = 0) -> str:
    return to_sample(row, Reading()).turns[turn]["text"]


@pytest.mark.parametrize(
    ("row", "text"),
    [
        ({"image": "x.png", "conversations": [HI, GPT]}, f"{IMAGE}\nhi"),
        ({"image": "x.png", "conversations": [HUMAN, GPT]}, f"{IMAGE}\nwhat digit is written ?"),
        ({"images": ["x", "y"], "conversations": [says("a <image> b <image>"), GPT]}, f"a {IMAGE} b {IMAGE}"),
        ({"images": [{"bytes": b"x", "path": None}], "messages": [HI, GPT]}, f"{IMAGE}\nhi"),
        ({"image": "x.png", "conversations": [SYSTEM, HI, GPT]}, "be brief"),
        ({"image": "x.png", "conversations": [says(""), GPT]}, IMAGE),
        ({"image": None, "conversations": [says("what does <image> do ?"), GPT]}, "what does <image> do ?"),
        ({"conversations": [says("a <image> b"), GPT]}, "a <image> b"),
        ({"conversations": [says("a <image 1> b"), GPT]}, "a <image 1> b"),
        ({"conversations": [says(" hi\n"), GPT]}, " hi\n"),
    ],
)
def test_the_first_turn_has_its_pictures_where_they_are_meant(row: dict[str, Any], text: str) -> None:
    assert text_of(row) == text


def test_pictures_without_marks_follow_a_system_turn() -> None:
    assert text_of({"image": "x.png", "conversations": [SYSTEM, HI, GPT]}, 1) == f"{IMAGE}\nhi"


def test_marks_in_answers_are_text() -> None:
    row = {"image": "x.png", "conversations": [HUMAN, says("write <image>", "gpt")]}
    sample = to_sample(row, Reading())
    assert sample.turns[1]["text"] == "write <image>" and sample.images == ["x.png"]


def test_a_picture_of_a_later_question_stands_in_it() -> None:
    sample = to_sample({"image": ["x", "y"], "conversations": [HUMAN, GPT, HUMAN, GPT]}, Reading())
    assert [IMAGE in turn["text"] for turn in sample.turns] == [True, False, True, False]


@pytest.mark.parametrize("mark", ["<image {}>", "<image{}>", "<image_{}>", "<|image_{}|>"])
def test_pictures_stand_at_the_first_of_their_numbered_marks(mark: str) -> None:
    first, second = mark.format(1), mark.format(2)
    asked = f"Is {second} like {first} ? What is in {first} ?"
    sample = to_sample({"images": ["x", "y"], "conversations": [says(asked), GPT, HI, GPT]}, Reading())
    assert sample.turns[0]["text"] == f"Is {IMAGE} like {IMAGE} ? What is in {first} ?"
    assert sample.images == ["y", "x"]


@pytest.mark.parametrize("mark", ["<ImageHere>", "<|image|>", "<|vision_start|><|image_pad|><|vision_end|>", "[IMG]"])
def test_marks_of_data_for_other_models_are_places_too(mark: str) -> None:
    row = {"image": ["x", "y"], "conversations": [says(f"is {mark} red ?"), GPT, says(f"and {mark} ?"), GPT]}
    sample = to_sample(row, Reading())
    assert [sample.turns[at]["text"] for at in (0, 2)] == [f"is {IMAGE} red ?", f"and {IMAGE} ?"]


def test_words_may_name_their_pictures() -> None:
    asked = "Picture 1: <img>a b.png</img>\nPicture 2: <img>http://there/b.png</img>\nWhat differs ?"
    sample = to_sample({"conversations": [says(asked), GPT]}, Reading())
    assert sample.turns[0]["text"] == f"Picture 1: {IMAGE}\nPicture 2: {IMAGE}\nWhat differs ?"
    assert sample.images == ["a b.png", "http://there/b.png"]


def test_beside_places_of_pictures_numbered_marks_are_text() -> None:
    asked = "<image>\n<image>\nIs <image 1> like <image 2> ?"
    sample = to_sample({"images": ["x", "y"], "conversations": [says(asked), GPT]}, Reading())
    assert sample.turns[0]["text"] == f"{IMAGE}\n{IMAGE}\nIs <image 1> like <image 2> ?"


@pytest.mark.parametrize("image", [None, "", [], {"bytes": None, "path": None}])
def test_a_field_without_an_image_is_none(image: Any) -> None:
    assert to_sample({**SPOKEN, "image": image}, Reading()).images == []


@pytest.mark.parametrize("value", [{"path": "x"}, {"bytes": None, "path": "x"}, {"url": "x"}])
def test_an_image_without_bytes_is_its_path(value: Any) -> None:
    assert to_sample({**SPOKEN, "image": value}, Reading()).images == ["x"]


def test_a_number_in_an_answer_is_its_text() -> None:
    assert text_of(answered(3), 1) == "3" and text_of(answered(0.5), 1) == "0.5"


def test_keys_that_are_not_known_are_ignored() -> None:
    row = {**SPOKEN, "label": True, "rejected": "x", "system": " ", "functions": "[]", "history": [], "weight": 70}
    assert to_sample(row, Reading()) == to_sample(SPOKEN, Reading())
    row = {**SPOKEN, "id": None, "label": 0, "score": float("nan"), "tools": [], "video": None, "audios": []}
    assert to_sample(row, Reading()) == to_sample(SPOKEN, Reading())


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({**SPOKEN, "system": "be kind", "system_prompt": "be kind"}, "has 'system' and 'system_prompt'"),
        ({"conversations": [SYSTEM, HI, GPT], "system": "be kind"}, "has 'system' and a system turn"),
        ({**SPOKEN, "system": ["be kind"]}, "a list as 'system'"),
        ({**SPOKEN, "tools": '[{"name": "look"}]'}, "has 'tools'; calls of tools"),
        ({**SPOKEN, "functions": [{"name": "look"}]}, "has 'functions'; calls of tools"),
        ({**SPOKEN, "label": False}, "has 'label': false, so that its answers are not to be learned"),
        ({**SPOKEN, "kto_tag": False}, "has 'kto_tag': false"),
        ({**SPOKEN, "history": [["hi", "seven"]]}, "has 'history', which is not read; put its turns before"),
        ({**SPOKEN, "weight": 0}, "has 'weight': 0, so that its answers are not to be learned; leave the row out"),
        ({**SPOKEN, "loss": False}, "has 'loss': false, so that"),
        ({**SPOKEN, "train_on_turn": 0.0}, "has 'train_on_turn': 0.0, so that"),
        ({"text": "x"}, "neither 'conversations' nor 'messages'"),
        ({"question": "x", "answer": "y"}, "data.columns is not set"),
        ({"conversations": [HI], "messages": [HI]}, "both 'conversations' and 'messages'"),
        ({"conversations": []}, "an empty list as 'conversations'"),
        ({"conversations": "x"}, "a text as 'conversations'"),
        ({"conversations": [3]}, "a number as a turn"),
        ({"conversations": [HUMAN]}, "no answer"),
        ({"conversations": [GPT]}, "no turn of the user"),
        ({"conversations": [GPT, HI, GPT]}, "starts with an answer"),
        ({"conversations": [HI, HI, GPT]}, "two turns of the user in a row, turns 1 and 2"),
        ({"conversations": [HI, GPT, GPT]}, "two turns of the assistant"),
        ({"conversations": [HI, GPT, HI]}, "ends with a question"),
        ({"conversations": [HI, SYSTEM, GPT]}, "a system turn that is not the first"),
        ({"conversations": [says(" "), GPT]}, "a blank question"),
        (answered(None), "null as an answer"),
        (answered(float("nan")), "NaN as an answer"),
        (answered(float("inf")), "Infinity as an answer"),
        (answered(True), "true as an answer"),
        (answered({"a": 1}), "an object as an answer"),
        (answered([["a"]]), "a list as a part of an answer"),
        (answered([]), "a blank answer"),
        (answered(" \n"), "a blank answer"),
        (answered("\u200b"), "a blank answer"),
        (answered("\ufeff \u00ad"), "a blank answer"),
        ({"conversations": [says("\u200b"), GPT]}, "a blank question"),
        (answered("\ud800"), "half a character"),
        (answered(f"a{IMAGE}"), "U\\+FDD0"),
        ({**SPOKEN, "video": "x.mp4"}, "has 'video'; video is not read"),
        ({**SPOKEN, "audios": ["x.wav"]}, "has 'audios'; audio is not read"),
        ({"conversations": [says("<video>\nwhat ?"), GPT]}, "mark <video>"),
        ({"conversations": [says("<audio>"), GPT]}, "mark <audio>"),
        ({"conversations": [HUMAN, GPT]}, "1 <image> marks and 0 images"),
        ({"image": ["a", "b"], "conversations": [HUMAN, GPT]}, "1 <image> marks and 2 images"),
        (
            {"image": ["a", "b"], "conversations": [says("what of <image 2> ?"), GPT]},
            "the marks <image 2> and 2 images",
        ),
        ({"image": ["a", "b"], "conversations": [says("[IMG] ?"), GPT]}, r"1 \[IMG\] marks and 2 images"),
        ({"conversations": [says("<|image|>what ?"), GPT]}, r"1 <\|image\|> marks and 0 images"),
        ({"image": "a", "conversations": [says("<img>b</img>"), GPT]}, "<img>b</img> in a question, and 1 images"),
        ({"image": "a", "conversations": [says("<image1><image2>"), GPT]}, "the marks <image1>, <image2> and 1 images"),
        ({"conversations": [says("<image 1>\nwhat ?"), GPT]}, "1 <image 1> marks and 0 images"),
        ({"image": "a", "images": ["b"], **SPOKEN}, "both 'image' and 'images'"),
        ({"image": 3, **SPOKEN}, "a number as an image"),
        ({"image": [None], **SPOKEN}, "null as an image"),
        ({"image": {"bytes": "text"}, **SPOKEN}, "an image that is an object without"),
        ({"image": " ", **SPOKEN}, "white space as an image"),
    ],
    ids=str,
)
def test_a_bad_row_says_what_is_wrong(row: dict[str, Any], message: str) -> None:
    with pytest.raises(FormatError, match=message):
        to_sample(row, Reading())
