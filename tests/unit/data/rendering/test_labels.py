"""What is supervised, in every family: each answer as it stands and the token that ends it, and nothing else."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from qmixlora.data import IGNORED, IMAGE, Collator

from ..chats import CHATS, CONTROL, LLAVA, THINKS, Chat, embedded, processor_of

FAMILIES = ["embedded", *CHATS]
LETTERS = st.characters(exclude_categories=["Cs", "Cn"], exclude_characters="\0")  # no surrogates: no text has them
PIECES = st.one_of(
    st.text(LETTERS, min_size=1, max_size=8),
    st.sampled_from([*CONTROL, "<think>", " ", "\n", "\n\n", "    x", "the", " red.", "é", "\U00100003", "\U0010fffd"]),
)
TEXTS = st.lists(PIECES, min_size=1, max_size=5).map("".join)
QUESTIONS = TEXTS.map(lambda text: text.replace(IMAGE, "?"))
KNOWN = st.lists(st.sampled_from(["red", "circle", "what", "?", *CONTROL]), min_size=1, max_size=5).map(" ".join)
KNOWN_QUESTIONS = KNOWN.map(lambda text: text.replace(IMAGE, "?"))
BLANKS = st.sampled_from(["", " ", "\n  ", "\t"])


@cache
def collator_of(family: str) -> Collator:
    return Collator(embedded() if family == "embedded" else processor_of(CHATS[family]), 100_000)


@pytest.fixture(scope="module")
def picture(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("pictures") / "p.png"
    Image.new("RGB", (28, 28), (200, 10, 10)).save(path)
    return path


def row_of(turns: list[tuple[str, str, int]], picture: Path) -> Any:
    """A row of questions, answers and numbers of pictures in front of the questions."""
    spoken = []
    for question, answer, pictures in turns:
        spoken += [
            {"role": "user", "text": IMAGE * pictures + "\n" * bool(pictures) + question},
            {"role": "assistant", "text": answer},
        ]
    images = [{"path": str(picture), "bytes": None}] * sum(pictures for _, _, pictures in turns)
    return {"turns": spoken, "images": images, "task": "t"}


def spans(collator: Collator, batch: dict[str, Any], index: int = 0) -> list[list[int]]:
    """The runs of supervised tokens of a sample, each up to its end token."""
    found: list[list[int]] = [[]]
    for token, label in zip(batch["input_ids"][index].tolist(), batch["labels"][index].tolist(), strict=True):
        if label != IGNORED:
            assert token == label
            found[-1].append(token)
        if found[-1] and (label == IGNORED or token == collator.end_id):
            found.append([])
    return found[:-1]


def check(family: str, turns: list[tuple[str, str, int]], picture: Path) -> None:
    """The labels of a conversation are its answers with their ends, and its prompt is how it begins."""
    collator, row = collator_of(family), row_of(turns, picture)
    tokenizer, batch = collator.processor.tokenizer, collator([row])
    supervised = spans(collator, batch)
    assert len(supervised) == len(turns)
    for (_, answer, _), ids in zip(turns, supervised, strict=True):
        said_before = collator.template._said_before
        if family == "embedded":  # knows words alone: letters are unknown to it
            expected = " ".join(word for word in tokenizer.decode(ids[:-1]).split() if word != "<unk>")
            assert expected == " ".join(word for word in answer.split() if word not in CONTROL)
        else:
            text = tokenizer.decode(ids, clean_up_tokenization_spaces=False)
            whole = said_before + answer + collator.template.end_token
            assert text == whole or (CHATS[family].tokens == "llama" and text == whole[1:])  # its decoder takes a blank
        assert ids[-1] == collator.end_id and set(collator.stop_ids).isdisjoint(ids[:-1])
    prompt = collator.prompts([row])["input_ids"][0].tolist()
    first = len(prompt)
    assert batch["input_ids"][0, :first].tolist() == prompt and batch["labels"][0, first] != IGNORED
    assert (batch["labels"][0, first:] != IGNORED).sum() == len(supervised[-1])
    image = getattr(collator.processor, "image_token_id", None)
    assert not (batch["labels"] == image).any()


@pytest.mark.parametrize("family", sorted(CHATS))
@settings(max_examples=40)
@given(
    turns=st.lists(
        st.tuples(QUESTIONS, st.tuples(BLANKS, TEXTS, BLANKS).map("".join), st.just(0)), min_size=1, max_size=5
    )
)
def test_every_answer_is_supervised_as_it_stands_whatever_it_says(
    picture: Path, family: str, turns: list[tuple[str, str, int]]
) -> None:
    check(family, turns, picture)


@settings(max_examples=40)
@given(turns=st.lists(st.tuples(KNOWN_QUESTIONS, KNOWN, st.integers(0, 2)), min_size=1, max_size=4))
def test_the_embedded_model_learns_answers_of_the_words_that_it_knows(
    picture: Path, turns: list[tuple[str, str, int]]
) -> None:
    check("embedded", turns, picture)


@pytest.mark.parametrize("family", sorted(CHATS))
@settings(max_examples=5)
@given(turns=st.lists(st.tuples(QUESTIONS, TEXTS, st.integers(0, 2)), min_size=2, max_size=3))
def test_pictures_stand_in_any_question(picture: Path, family: str, turns: list[tuple[str, str, int]]) -> None:
    check(family, turns, picture)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_shorter_sample_of_a_batch_has_the_labels_that_it_has_alone(picture: Path, family: str) -> None:
    collator = collator_of(family)
    short, long = row_of([("red ?", "red", 1)], picture), row_of([("what", "circle", 1), ("red ?", "red", 1)], picture)
    alone, together = collator([short]), collator([short, long])
    length = alone["input_ids"].shape[1]
    for name in ("input_ids", "labels", "routing_mask"):
        assert torch.equal(alone[name][0], together[name][0, :length])
    assert (together["labels"][0, length:] == IGNORED).all()


@pytest.mark.parametrize("family", sorted(set(CHATS) - {"llava"}))
def test_the_tokens_are_those_of_the_processor_alone(picture: Path, family: str) -> None:
    """(For texts without control tokens; an answer of LLaVA's gets an end that the template does not write.)"""
    collator, row = collator_of(family), row_of([("what is it?\n", "a red circle", 1), ("why?", "so", 0)], picture)
    processor, image = collator.processor, Image.open(picture)
    messages = [
        {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "what is it?\n"}]},
        {"role": "assistant", "content": [{"type": "text", "text": "a red circle"}]},
        {"role": "user", "content": [{"type": "text", "text": "why?"}]},
        {"role": "assistant", "content": [{"type": "text", "text": "so"}]},
    ]
    text = processor.apply_chat_template(messages)
    bos = processor.tokenizer.bos_token
    own = not (bos and text.startswith(bos))
    expected = processor(text=[text], images=[[image]], return_tensors="pt", add_special_tokens=own)
    made = collator([row])
    assert made["input_ids"].tolist() == expected["input_ids"].tolist()
    for name in expected.keys() - {"token_type_ids"} & made.keys():
        assert torch.equal(made[name], expected[name]), name


def test_a_template_that_ends_no_answer_gets_the_end_of_text_after_each(picture: Path) -> None:
    collator = collator_of("llava")
    ids = collator([row_of([("what ?", "red", 0), ("why ?", "so", 0)], picture)])["input_ids"][0]
    assert (
        collator.processor.tokenizer.decode(ids) == "<s> USER: what ? ASSISTANT: red</s> USER: why ? ASSISTANT: so</s> "
    )


def test_a_prompt_has_the_ends_that_training_had(picture: Path) -> None:
    collator = collator_of("llava")
    ids = collator.prompts([row_of([("what ?", "red", 0), ("why ?", "so", 0)], picture)])["input_ids"][0]
    assert collator.processor.tokenizer.decode(ids) == "<s> USER: what ? ASSISTANT: red</s> USER: why ? ASSISTANT:"


def test_a_generation_prompt_that_ends_in_a_blank_has_its_tokens_in_training(picture: Path) -> None:
    """One token has the blank and the first word of an answer; generation would begin behind the blank."""
    blank = LLAVA.replace("'ASSISTANT:'", "'ASSISTANT: '")
    collator = Collator(processor_of(Chat("llava", "llama", blank, "</s>")), 1000)
    row = row_of([("what ?", "red", 0)], picture)
    prompt = collator.prompts([row])["input_ids"][0].tolist()
    assert collator([row])["input_ids"][0].tolist()[: len(prompt)] == prompt


def test_tokens_of_thoughts_stay_what_they_are(picture: Path) -> None:
    collator = collator_of("qwen3_vl")
    batch = collator([row_of([("what ?", "<think>\nhm\n</think>\n\nred", 0)], picture)])
    tokens = collator.processor.tokenizer.convert_ids_to_tokens(spans(collator, batch)[0])
    assert tokens[0] == "<think>" and "</think>" in tokens


def test_thoughts_are_supervised_from_where_generation_begins(picture: Path) -> None:
    collator = Collator(processor_of(THINKS), 1000)
    row = row_of([("what ?", "red", 0), ("why ?", "<think>\nhm\n</think>\n\nso", 0)], picture)
    [ids] = spans(collator, collator([row]))
    assert collator.processor.tokenizer.decode(ids) == "hm\n</think>\n\nso<|im_end|>"
    assert collator.processor.tokenizer.decode(collator.prompts([row])["input_ids"][0]).endswith("assistant\n<think>\n")
