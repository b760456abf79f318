"""Held-out rows: of every task in proportion, seeded, and with images that training does not show."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest
from datasets import Dataset, Features
from hypothesis import given, settings
from hypothesis import strategies as st

from qmixlora.data.reading.store import FEATURES
from qmixlora.data.splits.cutting import cut
from qmixlora.errors import UserError


def rows_of(samples: list[tuple[str, list[str]]]) -> Dataset:
    """Rows by task and the paths of their images."""
    turns = [{"role": "user", "text": "a"}, {"role": "assistant", "text": "b"}]
    rows: list[dict[str, Any]] = [
        {"turns": turns, "images": [{"path": path, "bytes": None} for path in paths], "task": task}
        for task, paths in samples
    ]
    return Dataset.from_list(rows)


MANY = rows_of([("abc"[index % 3], [f"{index}.png"]) for index in range(300)])


def test_every_task_is_held_out_in_proportion() -> None:
    held_out = cut(MANY, 30, 0, "here").held_out
    assert Counter(MANY[index]["task"] for index in held_out) == {"a": 10, "b": 10, "c": 10}


def test_a_number_of_rows_is_held_out() -> None:
    assert len(cut(MANY, 60, 0, "here").held_out) == 60


def test_every_row_is_on_one_side() -> None:
    parts = cut(MANY, 60, 0, "here")
    assert sorted(parts.held_out + parts.rest) == list(range(300))


def test_the_seed_decides() -> None:
    assert cut(MANY, 30, 0, "here") == cut(MANY, 30, 0, "here") != cut(MANY, 30, 1, "here")


def test_rows_that_share_an_image_are_not_parted() -> None:
    """The chain 0-1, 1-2, 2-3, ... of five rows; each chain is one group."""
    chains = [("a", [f"{chain}-{link}", f"{chain}-{link + 1}"]) for chain in range(40) for link in range(5)]
    parts = cut(rows_of(chains), 40, 0, "here")
    assert {index // 5 for index in parts.held_out} & {index // 5 for index in parts.rest} == set()
    assert len(parts.held_out) == 40


def test_images_are_the_same_by_their_bytes() -> None:
    rows = [{"turns": [], "images": [{"path": None, "bytes": bytes([index // 2])}], "task": "a"} for index in range(40)]
    parts = cut(Dataset.from_list(rows), 20, 0, "here")
    assert {index // 2 for index in parts.held_out} & {index // 2 for index in parts.rest} == set()


def test_rows_without_images_are_the_same_by_their_turns() -> None:
    rows = [{"turns": [{"role": "user", "text": f"{index // 2}"}], "images": [], "task": "a"} for index in range(40)]
    parts = cut(
        Dataset.from_list(rows, Features({name: FEATURES[name] for name in ("turns", "images", "task")})), 20, 0, "here"
    )
    assert {index // 2 for index in parts.held_out} & {index // 2 for index in parts.rest} == set()
    assert len(parts.held_out) == 20


@pytest.mark.parametrize(("tasks", "rows", "amount"), [(200, 2, 20), (190, 5, 20), (100, 3, 30)])
def test_of_many_tasks_of_few_rows_no_more_is_held_out_than_was_asked_for(tasks: int, rows: int, amount: int) -> None:
    samples = [(f"{index % tasks}", [f"{index}"]) for index in range(tasks * rows)]
    parts = cut(rows_of(samples), amount, 0, "here")
    assert len(parts.held_out) == amount and {samples[index][0] for index in parts.rest} == {
        name for name, _ in samples
    }


def test_a_task_of_one_row_stays_in_training() -> None:
    samples = [("a", [f"{index}"]) for index in range(50)] + [("rare", ["x"])]
    assert 50 in cut(rows_of(samples), 5, 0, "here").rest


def test_a_task_of_few_rows_has_one_held_out() -> None:
    samples = [("a", [f"{index}"]) for index in range(50)] + [("few", [f"x{index}"]) for index in range(3)]
    held_out = cut(rows_of(samples), 5, 0, "here").held_out
    assert sum(index >= 50 for index in held_out) == 1


def test_what_cannot_be_cut_is_refused() -> None:
    with pytest.raises(UserError, match="cannot be cut") as refused:
        cut(rows_of([("a", ["one.png"])] * 10), 1, 0, "data.validation: 0.1")
    assert "data.validation" in str(refused.value)


@settings(max_examples=60, deadline=None)
@given(
    st.lists(
        st.tuples(st.sampled_from("abc"), st.lists(st.sampled_from("uvwxyz"), max_size=2)), min_size=2, max_size=30
    ),
    st.integers(1, 20),
)
def test_whatever_is_cut_shares_no_image(samples: list[tuple[str, list[str]]], amount: int) -> None:
    try:
        parts = cut(rows_of(samples), min(amount, len(samples)), 0, "here")
    except UserError:
        return
    shown = [{image for index in part for image in samples[index][1]} for part in (parts.held_out, parts.rest)]
    assert not shown[0] & shown[1] and parts.held_out and parts.rest
