"""Formats, labels exactly on answers, and what a broken data set says."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from qmixlora.data import IGNORED, Collator, load_conversations
from qmixlora.data.formats import FormatError, to_conversation, to_messages
from qmixlora.errors import UserError

Write = Callable[[str, Any], Path]
HUMAN = {"from": "human", "value": "<image>\nwhat digit is written ?"}
GPT = {"from": "gpt", "value": "seven"}


@pytest.fixture
def picture(tmp_path: Path) -> str:
    Image.new("RGB", (40, 30), (200, 10, 10)).save(tmp_path / "p.png")
    return "p.png"


def decoded(collator: Collator, batch: dict[str, Any], index: int, key: str) -> str:
    ids, mask = batch["input_ids"][index], batch[key][index]
    chosen = ids[mask != IGNORED] if key == "labels" else ids[mask]
    return str(collator.processor.tokenizer.decode(chosen))


def test_llava_messages_and_parquet_give_the_same_conversation(write_json: Write, tmp_path: Path, picture: str) -> None:
    import datasets

    llava = {"image": picture, "conversations": [HUMAN, GPT], "task": "digit"}
    text = {"type": "text", "text": "\nwhat digit is written ?"}
    chat = {
        "messages": [
            {"role": "user", "content": [{"type": "image", "image": picture}, text]},
            {"role": "assistant", "content": "seven"},
        ],
        "task_name": "digit",
    }
    (tmp_path / "b.jsonl").write_text(json.dumps(chat) + "\n\n", encoding="utf-8")
    datasets.Dataset.from_list([llava]).to_parquet(str(tmp_path / "c.parquet"))
    first = load_conversations(str(write_json("a.json", [llava])))[0]
    assert first["task"] == "digit" and first["images"][0]["path"].endswith("p.png")
    assert [turn["role"] for turn in first["turns"]] == ["user", "assistant"]
    for other in ("b.jsonl", "c.parquet"):
        assert load_conversations(str(tmp_path / other))[0] == first


def test_pictures_inside_parquet(tmp_path: Path, picture: str, processor: Any) -> None:
    import datasets

    whole = {"bytes": (tmp_path / picture).read_bytes(), "path": None}
    row = {"image": whole, "conversations": [HUMAN, GPT], "task": "t"}
    data = datasets.Dataset.from_list([row]).cast_column("image", datasets.Image())
    data.to_parquet(str(tmp_path / "d.parquet"))
    rows = load_conversations(str(tmp_path / "d.parquet"))
    assert Collator(processor, 64)([rows[0]])["pixel_values"].shape == (1, 3, 32, 32)


def test_the_task_comes_from_task_task_name_or_the_field_that_the_recipe_names() -> None:
    turns = {"conversations": [{"from": "human", "value": "hi"}, GPT]}
    vision_flan = "PlotQA+visual_question_answering"
    assert to_conversation({**turns, "task": "a", "task_name": "b"})["task"] == "a"
    assert to_conversation({**turns, "task_name": vision_flan})["task"] == vision_flan
    assert to_conversation({**turns, "task": "a", "set": "b"}, "set")["task"] == "b"
    assert to_conversation(turns)["task"] == "all"
    with pytest.raises(FormatError, match="no field 'set'"):
        to_conversation(turns, "set")


def test_a_picture_without_a_mark_belongs_to_the_first_question() -> None:
    row = {"image": "x.png", "conversations": [{"from": "human", "value": "what ?"}, GPT]}
    assert to_conversation(row)["turns"][0]["text"] == "<image>\nwhat ?"


def test_messages_put_the_picture_where_its_mark_stands() -> None:
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
def test_what_a_bad_sample_says(row: dict[str, Any], message: str) -> None:
    with pytest.raises(FormatError, match=message):
        to_conversation(row)


def test_errors_name_file_and_place(write_json: Write, tmp_path: Path, picture: str) -> None:
    def fails(source: Path, *words: str) -> None:
        with pytest.raises(UserError) as caught:
            load_conversations(str(source))
        for word in words:
            assert word in str(caught.value)

    fails(tmp_path / "none.json", "no such data file", "none.json")
    (tmp_path / "broken.json").write_text('[\n{"a": 1},\n{"a" 2}\n]', encoding="utf-8")
    fails(tmp_path / "broken.json", "Broken JSON", "line 3")
    good = json.dumps({"conversations": [{"from": "human", "value": "hi"}, GPT]})
    (tmp_path / "broken.jsonl").write_text(good + "\n{oops}\n", encoding="utf-8")
    fails(tmp_path / "broken.jsonl", "Broken JSON", "line 2")
    fails(write_json("dict.json", {"a": 1}), "JSON list")
    fails(write_json("empty.json", []), "empty")
    fails(write_json("odd.json", [json.loads(good), 3]), "JSON object", "sample 1")
    fails(write_json("format.json", [{"conversations": [HUMAN]}]), "no answer", "sample 0")
    fails(write_json("gone.json", [{"image": "gone.png", "conversations": [HUMAN, GPT]}]), "missing", "gone.png")
    (tmp_path / "junk.png").write_bytes(b"no picture")
    fails(write_json("junk.json", [{"image": "junk.png", "conversations": [HUMAN, GPT]}]), "cannot be read", "junk.png")
    (tmp_path / "bad.parquet").write_bytes(b"no parquet")
    fails(tmp_path / "bad.parquet", "Cannot read", "bad.parquet")


def test_a_picture_with_a_good_header_and_no_body_is_named(
    write_json: Write, tmp_path: Path, picture: str, processor: Any
) -> None:
    whole = (tmp_path / picture).read_bytes()
    (tmp_path / "cut.png").write_bytes(whole[:60])
    rows = load_conversations(str(write_json("c.json", [{"image": "cut.png", "conversations": [HUMAN, GPT]}])))
    with pytest.raises(UserError, match=r"cannot be read(.|\n)*cut\.png"):
        Collator(processor, 64)([rows[0]])


def test_labels_stand_on_answers_alone(write_json: Write, picture: str, processor: Any) -> None:
    turns = [HUMAN, GPT, {"from": "human", "value": "how big is the circle ?"}, {"from": "gpt", "value": "large"}]
    short = [HUMAN, {"from": "gpt", "value": "top-left"}]
    rows = load_conversations(
        str(write_json("m.json", [{"image": picture, "conversations": c} for c in (turns, short)]))
    )
    collator = Collator(processor, 64)
    batch = collator([rows[0], rows[1]])
    assert decoded(collator, batch, 0, "labels") == "seven <eos> large <eos>"
    assert decoded(collator, batch, 1, "labels") == "top-left <eos>"
    prompt = "<bos> user : <image> <image> <image> <image> what digit is written ? assistant :"
    assert decoded(collator, batch, 0, "routing_mask") == prompt  # the first question alone
    assert decoded(collator, batch, 1, "routing_mask") == prompt
    assert batch["tasks"] == ["all", "all"]
    image = processor.image_token_id
    assert not (batch["labels"] == image).any()
    assert (batch["labels"][batch["attention_mask"] == 0] == IGNORED).all()


words = st.sampled_from(["red", "circle", "what", "seven", "yes", "?", "left"])
sentences = st.lists(words, min_size=1, max_size=5).map(" ".join)


@settings(max_examples=25, deadline=None)
@given(st.lists(st.tuples(sentences, sentences), min_size=1, max_size=4), st.booleans())
def test_the_supervised_tokens_are_the_answers(dialogue: list[tuple[str, str]], system: bool) -> None:
    processor = _processor()
    turns = [{"role": "system", "text": "what ?"}] * system
    for question, answer in dialogue:
        turns += [{"role": "user", "text": question}, {"role": "assistant", "text": answer}]
    collator = Collator(processor, 512)
    batch = collator([{"turns": turns, "images": [], "task": "t"}])
    assert decoded(collator, batch, 0, "labels") == " ".join(f"{answer} <eos>" for _, answer in dialogue)
    first = next(i for i, label in enumerate(batch["labels"][0].tolist()) if label != IGNORED)
    assert batch["routing_mask"][0].tolist() == [i < first for i in range(len(batch["input_ids"][0]))]


def _processor() -> Any:
    from qmixlora.demo.backbone import make_processor

    if not hasattr(_processor, "cached"):
        _processor.cached = make_processor()  # type: ignore[attr-defined]
    return _processor.cached  # type: ignore[attr-defined]


def test_prompts_end_where_the_last_answer_begins(write_json: Write, picture: str, processor: Any) -> None:
    turns = [HUMAN, GPT, {"from": "human", "value": "how big ?"}, {"from": "gpt", "value": "large"}]
    rows = load_conversations(
        str(write_json("m.json", [{"image": picture, "conversations": c} for c in (turns, [HUMAN, GPT])]))
    )
    collator = Collator(processor, 64)
    prompts = collator.prompts([rows[0], rows[1]])
    assert prompts["attention_mask"][1, 0] == 0  # padded on the left
    texts = processor.tokenizer.batch_decode(prompts["input_ids"])
    assert texts[0].endswith("seven <eos> user : how big ? assistant :")
    assert texts[1].endswith("written ? assistant :")


def test_samples_are_never_cut(write_json: Write, picture: str, processor: Any) -> None:
    rows = load_conversations(str(write_json("m.json", [{"image": picture, "conversations": [HUMAN, GPT]}])))
    with pytest.raises(UserError, match=r"over data\.max_length, 8"):
        Collator(processor, 8)([rows[0]])


def test_a_picture_after_an_answer_is_refused(write_json: Write, picture: str, processor: Any) -> None:
    rows = load_conversations(
        str(write_json("m.json", [{"image": [picture, picture], "conversations": [HUMAN, GPT, HUMAN, GPT]}]))
    )
    with pytest.raises(UserError, match="follows an answer"):
        Collator(processor, 64)([rows[0]])
