"""A conversation: its answers are those of the rows that it makes, and it goes on behind what was said."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset

from qmixlora.chat import Dialogue
from qmixlora.chat.dialogue import Streamer
from qmixlora.data import IMAGE, Collator, Conversation, load_split, only_tasks
from qmixlora.errors import UserError
from qmixlora.evaluation import generate_answers
from qmixlora.recipe import Recipe
from qmixlora.session import Session, open_session
from tests.adapters import randomize

PIXELS = 10**6


@pytest.fixture
def session(make_recipe: Callable[..., Recipe]) -> Session:
    session = open_session(make_recipe(), [])
    randomize(session.model, "mixlora_B", std=0.2, seed=0)
    session.model.eval()
    return session


@pytest.fixture
def rows(session: Session) -> Dataset:
    return only_tasks(load_split(session.recipe.data, "test"), ["color"], "test")


@pytest.fixture
def dialogue(rows: Dataset) -> Dialogue:
    return Dialogue(Path(rows[0]["images"][0]["path"]), "color", PIXELS)


def test_one_question_is_answered_as_its_row(session: Session, rows: Dataset, dialogue: Dialogue) -> None:
    expected = generate_answers(session, [rows[0]])[0].strip()
    assert dialogue.ask(session, rows[0]["turns"][0]["text"].replace(IMAGE, "").strip()) == expected


def test_a_dialogue_goes_on_behind_what_was_said(session: Session, rows: Dataset, dialogue: Dialogue) -> None:
    dialogue.ask(session, "what is it ?")
    before = dialogue.turns
    answer = dialogue.ask(session, "how big is the circle ?")
    assert dialogue.turns[:2] == before and [turn["text"].count(IMAGE) for turn in dialogue.turns] == [1, 0, 0, 0]
    asked = {"turns": dialogue.turns, "images": rows[0]["images"], "task": "color"}
    assert generate_answers(session, [asked])[0].strip() == answer


def test_another_task_is_that_of_what_is_asked_from_now_on(
    session: Session, dialogue: Dialogue, monkeypatch: pytest.MonkeyPatch
) -> None:
    told = []

    def remembered(session: Session, rows: list[Conversation], **how: Any) -> list[str]:
        told.append(session.collator.routed_prompts(rows)[1]["tasks"])
        return generate_answers(session, rows, **how)

    monkeypatch.setattr("qmixlora.chat.dialogue.generate_answers", remembered)
    dialogue.ask(session, "what is it ?")
    dialogue.task = "count"
    dialogue.ask(session, "how many ?")
    dialogue.ask(session, "how many more ?")
    assert told == [["color"], [["color", "count"]], [["color", "count", "count"]]]


def test_the_streamed_parts_are_the_answer(session: Session, dialogue: Dialogue) -> None:
    parts: list[str] = []
    answer = dialogue.ask(session, "what is it ?", parts.append)
    assert "".join(parts).strip() == answer


@pytest.mark.parametrize(
    ("name", "pixels", "message"),
    [
        ("none.png", PIXELS, "missing"),
        ("none/none.png", PIXELS, "missing"),
        ("x" * 5000, PIXELS, "name too long"),
        (f"{'x' * 5000}/a.png", PIXELS, "name too long"),
        ("a\0b.png", PIXELS, "no file can have"),
        ("", PIXELS, "is a folder"),
        (None, 1, "pixels"),
    ],
)
def test_an_image_that_cannot_be_shown_is_refused(
    rows: Dataset, tmp_path: Path, name: str | None, pixels: int, message: str
) -> None:
    with pytest.raises(UserError, match=message):
        Dialogue(Path(rows[0]["images"][0]["path"]) if name is None else tmp_path / name, None, pixels)


def test_what_helps_with_an_image_is_for_a_chat(rows: Dataset, tmp_path: Path) -> None:
    whole = Path(rows[0]["images"][0]["path"]).read_bytes()
    for name, content, pixels in (("header", whole[:20], PIXELS), ("body", whole[:-40], PIXELS), ("large", whole, 1)):
        (tmp_path / name).write_bytes(content)
        with pytest.raises(UserError) as raised:
            Dialogue(tmp_path / name, None, pixels)
        assert raised.value.fix and "sample" not in raised.value.fix, name


def test_special_tokens_that_data_says_are_shown_as_they_come(session: Session) -> None:
    collator = session.collator
    assert isinstance(collator, Collator)
    tokenizer = collator.processor.tokenizer
    eos, special = tokenizer.eos_token, tokenizer.all_special_ids
    told: list[str] = []
    for named in ((), (eos,)):
        streamer = Streamer(replace(collator, special_tokens=named), told.append)
        streamer.put(torch.tensor([0]))  # the prompt
        for token in special:
            streamer.put(torch.tensor([token]))
        streamer.end()
        told.append("|")
    assert "".join(told) == f"|{eos}|"
