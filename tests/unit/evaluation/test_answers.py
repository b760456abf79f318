"""Answers by real generation: one per row, in the rows' order, whatever the batches."""

from __future__ import annotations

import json
import shutil
import sys
import types
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
from datasets import Dataset

from qmixlora.data import Conversation, load_split, only_tasks
from qmixlora.evaluation import (
    UnscoredError,
    answer_rows,
    evaluate,
    generate_answers,
    keep_unscored,
    score,
    stop_ids,
)
from qmixlora.evaluation import answers as answers_of
from qmixlora.evaluation.answers import _generated
from qmixlora.recipe import Recipe, edited
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
    scores = evaluate(session, rows, "test")
    assert [replace(one, cut=False, image_keys=None) for one in scores.predictions] == (
        score(rows, answer_rows(session, rows), "test").predictions
    )


def test_predictions_tell_images_apart_by_their_content(session: Session, rows: Dataset, tmp_path: Path) -> None:
    def keys(shown: list[Conversation]) -> list[list[str] | None]:
        data = Dataset.from_list(shown)
        return [one.image_keys for one in evaluate(session, data, "test").with_image_keys(data).predictions]

    first, second = list(rows)[:2]
    copy = shutil.copyfile(str(first["images"][0]["path"]), tmp_path / "copy.png")
    moved = {**first, "images": [{"path": str(copy), "bytes": None}]}
    inside = {**first, "images": [{"path": None, "bytes": copy.read_bytes()}]}
    [one], [two], [three], [other] = keys([first]), keys([moved]), keys([inside]), keys([second])
    assert one == two == three != other


def test_answers_that_had_not_ended_are_marked_and_counted(session: Session, rows: Dataset) -> None:
    """An end that is the last token that an answer may have is an end."""
    session.model.eval()
    tokens_BS, _ = _generated(session, list(rows), 64)
    stops = set(stop_ids(session))
    lengths = [
        next((index for index, token in enumerate(tokens_S, start=1) if token in stops), 65)
        for tokens_S in tokens_BS.tolist()
    ]
    soonest = min(lengths)
    assert soonest < max(lengths)
    for limit in (soonest - 1, soonest):
        assert _generated(session, list(rows), limit)[1] == [length > limit for length in lengths]
    of_limit = replace(session, recipe=edited(session.recipe, [f"train.max_new_tokens={soonest}"]))
    scores = evaluate(of_limit, rows, "test")
    assert [one.cut for one in scores.predictions] == [length > soonest for length in lengths]
    assert scores.cut == sum(own.cut for own in scores.tasks.values()) == sum(length > soonest for length in lengths)


def test_a_metric_that_fails_loses_no_answers(
    session: Session, rows: Dataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is tried on the references before anything is generated."""
    known = {row["turns"][-1]["text"] for row in rows}
    module = types.ModuleType("own_metrics")
    module.of_known = lambda answers, references: [1.0 / (one in known) for one in answers]  # type: ignore[attr-defined]
    module.none = lambda answers, references: [1 / 0]  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "own_metrics", module)

    def with_metric(name: str) -> Session:
        changes = ["data.allow_code=true", f"data.metrics={{'*': 'own_metrics:{name}'}}"]
        return replace(session, recipe=edited(session.recipe, changes))

    answers = answer_rows(session, rows)
    assert not known.issuperset(answers)
    with pytest.raises(UnscoredError, match="ZeroDivisionError") as caught:
        evaluate(with_metric("of_known"), rows, "validation")
    told = keep_unscored(tmp_path, caught.value)
    lines = (tmp_path / "unscored-validation.jsonl").read_text(encoding="utf-8").splitlines()
    assert [json.loads(line)["answer"] for line in lines] == answers
    assert str(tmp_path / "unscored-validation.jsonl") in told.what and told.where == "data.metrics"
    monkeypatch.setattr(answers_of, "_generated", None)
    with pytest.raises(ZeroDivisionError):
        evaluate(with_metric("none"), rows, "validation")
