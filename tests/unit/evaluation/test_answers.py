"""Answers by real generation: one per row, in the rows' order, whatever the batches."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from datasets import Dataset

from qmixlora.data import IMAGE, load_split, only_tasks
from qmixlora.errors import UserError
from qmixlora.evaluation import Dialogue, answer_rows, evaluate, generate_answers, score
from qmixlora.recipe import Recipe
from qmixlora.session import Session, open_session
from tests.adapters import randomize


@pytest.fixture
def session(make_recipe: Callable[..., Recipe]) -> Session:
    session = open_session(make_recipe(adapter={"dropout": 0.5}), [])
    randomize(session.model, "mixlora_B", std=0.2, seed=0)
    return session


@pytest.fixture
def rows(session: Session) -> Dataset:
    return only_tasks(load_split(session.recipe.data, "test"), ["color", "where", "entailment"], "test")


def test_answers_come_in_the_order_of_the_rows_whatever_the_batches(session: Session, rows: Dataset) -> None:
    session.model.eval()
    one_by_one = [generate_answers(session, [row])[0] for row in rows]
    assert len(set(one_by_one)) > 1
    assert answer_rows(session, rows, batch_size=4) == one_by_one


def test_answers_are_as_long_as_the_recipe_says_unless_told_otherwise(session: Session, rows: Dataset) -> None:
    def longest(answers: list[str]) -> int:
        return max(len(answer.split()) for answer in answers)

    assert longest(answer_rows(session, rows)) <= 4  # train.max_new_tokens of the fixture's recipe
    assert longest(answer_rows(session, rows, max_new_tokens=1)) <= 1


def test_progress_counts_samples(session: Session, rows: Dataset) -> None:
    told: list[int] = []
    answer_rows(session, rows, batch_size=4, max_new_tokens=1, on_progress=told.append)
    assert told == [4, 6]


def test_answering_is_without_dropout_and_leaves_the_model_in_its_mode(session: Session, rows: Dataset) -> None:
    session.model.eval()
    expected = answer_rows(session, rows)
    session.model.train()
    assert answer_rows(session, rows) == expected
    assert session.model.training


def test_evaluation_is_the_score_of_the_answers(session: Session, rows: Dataset) -> None:
    assert evaluate(session, rows, "test") == score(rows, answer_rows(session, rows), "test")


def test_one_question_is_answered_as_its_row(session: Session, rows: Dataset) -> None:
    row = rows[0]
    session.model.eval()
    expected = generate_answers(session, [row])[0].strip()
    image = Path(row["images"][0]["path"])
    question = row["turns"][0]["text"].replace(IMAGE, "").strip()
    assert Dialogue(session, image, row["task"]).ask(question) == expected


def test_a_dialogue_goes_on_behind_what_was_said(session: Session, rows: Dataset) -> None:
    dialogue = Dialogue(session, Path(rows[0]["images"][0]["path"]), "t")
    dialogue.ask("what is it ?")
    before = dialogue.turns
    answer = dialogue.ask("how big is the circle ?")
    assert dialogue.turns[:2] == before and [turn["text"].count(IMAGE) for turn in dialogue.turns] == [1, 0, 0, 0]
    session.model.eval()
    asked = {"turns": dialogue.turns, "images": rows[0]["images"], "task": "t"}
    assert generate_answers(session, [asked])[0].strip() == answer


def test_a_question_about_an_image_that_is_not_there_is_refused(session: Session, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="image is missing"):
        Dialogue(session, tmp_path / "none.png", None).ask("what is it ?")


def test_the_streamed_parts_are_the_answer(session: Session, rows: Dataset) -> None:
    parts: list[str] = []
    answer = Dialogue(session, Path(rows[0]["images"][0]["path"]), "t").ask("what is it ?", parts.append)
    assert "".join(parts).strip() == answer
