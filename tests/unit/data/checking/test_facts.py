"""What splits hold, and what in held-out ones contradicts the training data."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from qmixlora.data import Collator, DataFacts, checked
from qmixlora.data.checking.padding import padding_of
from qmixlora.recipe import Data, Train

Facts = Callable[..., DataFacts]


def asked(answer: str, index: int, task: str = "t", image: str | None = None) -> dict[str, Any]:
    turns = [{"from": "human", "value": f"what ? {index}"}, {"from": "gpt", "value": answer}]
    return {"task": task, "conversations": turns, **({"image": image} if image else {})}


@pytest.fixture
def facts(write_json: Callable[[str, Any], Path], processor: Any) -> Facts:
    """The facts of training and validation rows."""

    def of(train: list[Any], validation: list[Any] | float, **more: Any) -> DataFacts:
        held_out = str(write_json("v.json", validation)) if isinstance(validation, list) else validation
        data = Data(train=str(write_json("t.json", train)), validation=held_out, **more)
        return checked(data, Collator(processor, 2048), ["train", "validation"]).facts(Train(micro_batch_size=4))

    return of


CLOSED = [asked(("yes", "no")[index % 2], index) for index in range(40)]


def test_answers_that_a_closed_task_does_not_have_in_training_are_told(facts: Facts) -> None:
    [warning] = facts(CLOSED, [asked("Yes", 0), asked("no", 101), asked("Yes", 2)]).warnings
    assert "2 answers of the task 't' are none of the 2" in warning and "'Yes'" in warning and "alike" in warning


def test_new_answers_of_an_open_task_are_expected(facts: Facts) -> None:
    assert not facts([asked(f"red {index}", index) for index in range(40)], [asked("blue", 0)]).warnings


def test_a_task_that_training_does_not_have_is_told(facts: Facts) -> None:
    [warning] = facts(CLOSED, [asked("yes", 100, task="T")]).warnings
    assert "'T' is not in the training data" in warning


def test_tasks_that_differ_in_capitals_alone_are_told(facts: Facts) -> None:
    [warning] = facts([*CLOSED, asked("yes", 99, task="T")], [asked("yes", 100)]).warnings
    assert warning.startswith("data.train: 'T' and 't' are tasks of their own")


@pytest.mark.parametrize(
    ("one", "other"),
    [("caf\u00e9", "cafe\u0301"), ("t", "t\u200b"), ("\ufb01ne", "fine"), ("x\u00ady", "x y")],
    ids=ascii,
)
def test_tasks_that_look_the_same_are_told_by_what_tells_them_apart(facts: Facts, one: str, other: str) -> None:
    rows = [asked("yes", index, task=(one, other)[index % 2]) for index in range(20)]
    [warning] = facts(rows, 0.2).warnings
    assert ascii(one) in warning and ascii(other) in warning and "are tasks of their own" in warning


def test_doubts_about_a_column_are_told_of_its_split(facts: Facts) -> None:
    rows = [{"q": f"? {index}", "a": answer, "o": ["red", "blue"]} for index, answer in enumerate(["A", "red"])]
    columns = {"question": "q", "answer": "a", "options": "o"}
    [warning] = facts(rows, [{"q": "?", "a": "A", "o": ["red", "blue"]}], columns=columns).warnings
    assert warning.startswith("data.train: 1 answers name an option by its letter and 1 by its text")


def test_images_of_the_training_data_in_other_splits_are_told(facts: Facts, tmp_path: Path) -> None:
    for name in ("a", "b"):
        Image.new("RGB", (8, 8)).save(tmp_path / f"{name}.png")
    train = [*CLOSED, asked("yes", 99, image="a.png")]
    [warning] = facts(train, [asked("yes", 0, image="a.png"), asked("no", 1, image="b.png"), asked("no", 2)]).warnings
    assert warning.startswith("data.validation: 1 of 3 samples show images of the training data") and "0.1" in warning


def test_samples_without_images_that_training_has_too_are_told(facts: Facts) -> None:
    [warning] = facts(CLOSED, [asked("yes", 0), asked("no", 0), asked("no", 100)]).warnings
    assert warning.startswith("data.validation: 1 of 3 samples are in the training data too") and "0.1" in warning


def test_tasks_of_which_a_cut_split_has_nothing_are_told(facts: Facts) -> None:
    [warning] = facts([*CLOSED, asked("one", 0, task="rare")], 0.2).warnings
    assert "1 of 2 tasks have no sample in it ('rare')" in warning and "file of its own" in warning


def test_a_split_that_is_cut_warns_of_nothing(facts: Facts) -> None:
    assert not facts(CLOSED, 0.2).warnings


def test_answers_longer_than_what_is_generated_are_told_with_the_limit_that_they_need(facts: Facts) -> None:
    """Of what is held out; of the training data only where nothing is."""
    long, ending = "red " * 40, [asked("red " * 31, 1), asked("red " * 32, 2)]
    [warning] = facts([asked(long, 9)], [asked(long, 0), asked("yes", 1), *ending]).warnings
    assert (
        warning.startswith("data.validation: 2 of 4 answers are longer") and warning.count("train.max_new_tokens") == 2
    )
    assert "train.max_new_tokens: 32)" in warning and "set train.max_new_tokens: 41" in warning
    assert not facts([asked(long, 0)], [asked("red " * 31, 1)]).warnings


def test_a_metric_of_no_task_is_told_with_the_nearest_name(
    facts: Facts, write_json: Callable[[str, Any], Path]
) -> None:
    metrics = {"*": "exact", "t": "exact", "science-qa": "choice"}
    [warning] = facts(CLOSED, 0.2, metrics=metrics).warnings
    assert warning.startswith("data.metrics.science-qa: ") and "Did you mean 't'?" in warning
    both = [*CLOSED, *(asked("yes", index, task="science_qa") for index in range(9))]
    [warning] = facts(both, 0.2, metrics=metrics).warnings
    assert "Did you mean 'science_qa'?" in warning
    test = str(write_json("test.json", [asked("yes", 0, task="science-qa")]))
    assert not facts(CLOSED, 0.2, metrics=metrics, test=test).warnings  # which was not looked at


def test_reasons_are_counted_without_their_numbers(facts: Facts) -> None:
    found = facts([*CLOSED, asked("red " * 3000, 1), asked("red " * 4000, 2)], [asked("yes", 0)])
    [(reason, count)] = found.splits[0].reasons.items()
    assert count == found.left_out == 2 and reason.startswith("A sample has N tokens, over data.max_length")


def test_padding_is_what_batches_are_filled_with() -> None:
    assert padding_of([10] * 8, Train(micro_batch_size=4)).shuffled == 0
    alone = padding_of([1, 2, 3, 4], Train())
    assert alone.shuffled == alone.by_length == 0 and alone.samples_of_a_batch == 1
    both = padding_of([4, 4, 4, 4, 16, 16, 16, 16] * 8, Train(micro_batch_size=4))
    assert both.by_length < 0.1 < both.shuffled < 0.7


def test_padding_in_batches_of_tokens_is_told_with_their_samples() -> None:
    """16 of 4 and 4 of 16 tokens fit into 64, and nothing is padded; 3 of 20 leave no more than a batch."""
    told = padding_of([4] * 16 + [16] * 4, Train(batch_tokens=64))
    assert (told.by_tokens, told.samples_by_tokens) == (0, 10) and told.samples_of_a_batch == 10
    assert padding_of([16, 8], Train(batch_tokens=32)).by_tokens == 0.25
