"""Labels stand exactly on answers, prompts end where the last one begins, and nothing is ever cut."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from qmixlora.data import IGNORED, Collator, load_conversations
from qmixlora.errors import UserError

from ..helpers import GPT, HUMAN, Write, decoded

HOW_BIG = [{"from": "human", "value": "how big is the circle ?"}, {"from": "gpt", "value": "large"}]


def of_turns(*dialogues: list[dict[str, str]], write: Write, image: str) -> list[Any]:
    """Rows with one image and these turns each, read from a file."""
    return list(load_conversations(str(write("m.json", [{"image": image, "conversations": d} for d in dialogues]))))


@pytest.fixture
def collator(processor: Any) -> Collator:
    return Collator(processor, 64)


@pytest.fixture
def batch(collator: Collator, write_json: Write, image: str) -> dict[str, Any]:
    """A sample of two questions beside a shorter one."""
    short = [HUMAN, {"from": "gpt", "value": "top-left"}]
    return collator(of_turns([HUMAN, GPT, *HOW_BIG], short, write=write_json, image=image))


def test_labels_stand_on_answers_alone(collator: Collator, batch: dict[str, Any]) -> None:
    assert decoded(collator, batch, 0, "labels") == "seven <eos> large <eos>"
    assert decoded(collator, batch, 1, "labels") == "top-left <eos>"


def test_no_label_stands_on_an_image_or_on_padding(collator: Collator, batch: dict[str, Any]) -> None:
    assert not (batch["labels"] == collator.processor.image_token_id).any()
    assert (batch["labels"][batch["attention_mask"] == 0] == IGNORED).all()


def test_every_segment_is_routed_by_its_own_question(collator: Collator, batch: dict[str, Any]) -> None:
    prompt = "<bos> user : <image> <image> <image> <image> what digit is written ? assistant :"
    second = "user : how big is the circle ? assistant :"
    assert decoded(collator, batch, 0, "routing_mask") == f"{prompt} {second}"
    assert decoded(collator, batch, 1, "routing_mask") == prompt


def test_a_segment_ends_with_the_token_that_ends_its_answer(collator: Collator, batch: dict[str, Any]) -> None:
    ids_S, numbers_S = batch["input_ids"][0], batch["segments"][0]
    texts = [collator.processor.tokenizer.decode(ids_S[numbers_S == number]) for number in (0, 1)]
    assert texts[0].endswith("written ? assistant : seven <eos>")
    assert texts[1] == "user : how big is the circle ? assistant : large <eos>"


def test_padding_is_in_no_segment(batch: dict[str, Any]) -> None:
    assert ((batch["segments"] == -1) == (batch["attention_mask"] == 0)).all()
    assert batch["segments"][1].max() == 0


def test_prompts_have_the_segments_of_their_history(collator: Collator, write_json: Write, image: str) -> None:
    rows = of_turns([HUMAN, GPT, *HOW_BIG], [HUMAN, GPT], write=write_json, image=image)
    inputs, routing = collator.routed_prompts(rows)
    whole = collator(rows)
    for index in range(2):
        real_S = inputs["attention_mask"][index].bool()
        count = int(real_S.sum())
        for name in ("segments", "routing_mask"):
            assert routing[name][index][real_S].tolist() == whole[name][index][:count].tolist()
        assert (routing["segments"][index][~real_S] == -1).all() and not routing["routing_mask"][index][~real_S].any()


def test_answers_of_several_tasks_have_a_label_for_each_segment(
    collator: Collator, write_json: Write, image: str
) -> None:
    sample = {"image": image, "task": ["digit", "size"], "conversations": [HUMAN, GPT, *HOW_BIG]}
    rows = list(load_conversations(str(write_json("m.json", [sample, {**sample, "task": "size"}]))))
    assert collator(rows)["tasks"] == collator.routed_prompts(rows)[1]["tasks"] == [["digit", "size"], "size"]


def test_an_answer_that_is_not_learned_has_no_labels_and_its_segment_is_as_ever(
    collator: Collator, write_json: Write, image: str
) -> None:
    plain = of_turns([HUMAN, GPT, *HOW_BIG], write=write_json, image=image)
    rows = of_turns([HUMAN, {**GPT, "loss": False}, *HOW_BIG], write=write_json, image=image)
    batch, learned = collator(rows), collator(plain)
    assert decoded(collator, batch, 0, "labels") == "large <eos>"
    assert decoded(collator, learned, 0, "labels") == "seven <eos> large <eos>"
    for name in ("input_ids", "segments", "routing_mask"):
        assert torch.equal(batch[name], learned[name]), name


def test_every_sample_has_its_task(batch: dict[str, Any]) -> None:
    assert batch["tasks"] == ["all", "all"]


words = st.sampled_from(["red", "circle", "what", "seven", "yes", "?", "left"])
sentences = st.lists(words, min_size=1, max_size=5).map(" ".join)


@settings(max_examples=25)
@given(st.lists(st.tuples(sentences, sentences), min_size=1, max_size=4), st.booleans())
def test_the_supervised_tokens_are_the_answers(processor: Any, dialogue: list[tuple[str, str]], system: bool) -> None:
    turns = [{"role": "system", "text": "what ?"}] * system
    for question, answer in dialogue:
        turns += [{"role": "user", "text": question}, {"role": "assistant", "text": answer}]
    collator = Collator(processor, 512)
    batch = collator([{"turns": turns, "images": [], "task": "t"}])
    assert decoded(collator, batch, 0, "labels") == " ".join(f"{answer} <eos>" for _, answer in dialogue)
    labels = batch["labels"][0].tolist()
    last = max(i for i, label in enumerate(labels) if label != IGNORED)
    asked = [label == IGNORED and i < last for i, label in enumerate(labels)]
    assert batch["routing_mask"][0].tolist() == asked
    ends = [i for i, own in enumerate(labels) if own != IGNORED and (i == last or labels[i + 1] == IGNORED)]
    expected = [min(sum(end < i for end in ends), len(dialogue) - 1) for i in range(len(labels))]
    assert batch["segments"][0].tolist() == expected


def test_prompts_end_where_the_last_answer_begins(collator: Collator, write_json: Write, image: str) -> None:
    prompts = collator.prompts(of_turns([HUMAN, GPT, *HOW_BIG], [HUMAN, GPT], write=write_json, image=image))
    texts = collator.processor.tokenizer.batch_decode(prompts["input_ids"])
    assert texts[0].endswith("seven <eos> user : how big is the circle ? assistant :")
    assert texts[1].endswith("written ? assistant :")


def test_prompts_are_padded_on_the_left(collator: Collator, write_json: Write, image: str) -> None:
    prompts = collator.prompts(of_turns([HUMAN, GPT, *HOW_BIG], [HUMAN, GPT], write=write_json, image=image))
    assert prompts["attention_mask"][1, 0] == 0 and prompts["attention_mask"][:, -1].all()


def test_the_tokens_of_a_prompt_are_those_of_its_batch_with_one_mark_for_an_image(
    collator: Collator, write_json: Write, image: str
) -> None:
    [row] = of_turns([HUMAN, GPT], write=write_json, image=image)
    tokens = collator.tokens(row["turns"][:-1], prompt=True)
    assert tokens.count(collator.processor.image_token_id) == 1
    assert len(tokens) + 3 == collator.prompts([row])["input_ids"].shape[1]  # an image has four


def test_samples_are_never_cut(processor: Any, write_json: Write, image: str) -> None:
    rows = of_turns([HUMAN, GPT], write=write_json, image=image)
    with pytest.raises(UserError, match=r"over data\.max_length, 8"):
        Collator(processor, 8)(rows)


def test_an_image_after_an_answer_is_part_of_its_question(collator: Collator, write_json: Write, image: str) -> None:
    sample = {"image": [image, image], "conversations": [HUMAN, GPT, HUMAN, GPT]}
    batch = collator([load_conversations(str(write_json("m.json", [sample])))[0]])
    assert decoded(collator, batch, 0, "labels") == "seven <eos> seven <eos>"
    assert batch["pixel_values"].shape[0] == 2


def test_a_row_that_is_too_long_is_named_by_its_origin(processor: Any, write_json: Write, image: str) -> None:
    [row] = of_turns([HUMAN, GPT], write=write_json, image=image)
    with pytest.raises(UserError, match=r"m.json, line 3 \(task all: 'what digit"):
        Collator(processor, 8)([{**row, "origin": "m.json, line 3"}])


def test_a_row_is_named_by_its_question_and_not_by_what_a_system_says(
    processor: Any, write_json: Write, image: str
) -> None:
    sample = {"image": image, "system": "Be terse, in every answer.", "conversations": [HUMAN, GPT]}
    [row] = load_conversations(str(write_json("m.json", [sample])))
    with pytest.raises(UserError) as refused:
        Collator(processor, 8)([row])
    assert refused.value.where.endswith("(task all: 'what digit is written ?')")
