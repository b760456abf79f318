"""Processes that make batches, and batches by length: an epoch holds the same, a resumed run goes on with the same."""

from __future__ import annotations

import shutil
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from qmixlora.data import Collator, lengths_of, load_conversations
from qmixlora.errors import UserError
from qmixlora.recipe import Data, Recipe
from qmixlora.session import open_session
from qmixlora.training import make_trainer, train, workers
from qmixlora.training.callbacks import ProgressDisplay
from qmixlora.training.sampling import SeededLengthGroupedSampler, StepGroupedSampler
from qmixlora.training.workers import loader_workers

from .card import assert_equal, resumed_from, weights
from .helpers import QUIET

TWO_EPOCHS = {"max_steps": 8, "save_every": 6, "gradient_accumulation": 2, "micro_batch_size": 6}  # 60 samples


@pytest.mark.parametrize("by_length", [False, True])
def test_a_run_with_workers_goes_on_where_one_without_them_stopped(
    make_recipe: Callable[..., Recipe], tmp_path: Path, by_length: bool
) -> None:
    alone = make_recipe(data={"num_workers": 0, "group_by_length": by_length}, train=TWO_EPOCHS)
    plain = train(alone, console=QUIET)
    data = alone.data.model_copy(update={"num_workers": 2})
    assert_equal(
        weights(resumed_from(plain, 6, alone.model_copy(update={"data": data}), tmp_path / "b")), weights(plain)
    )


@pytest.mark.parametrize("kind", [SeededLengthGroupedSampler, StepGroupedSampler])
def test_an_epoch_by_length_holds_every_sample_once_and_epochs_differ(
    kind: type[SeededLengthGroupedSampler | StepGroupedSampler],
) -> None:
    sampler = kind(8, [index % 37 for index in range(500)], seed=3)
    epochs = []
    for epoch in (0, 1, 0):
        sampler.set_epoch(epoch)
        epochs.append(list(sampler))
    assert all(Counter(order) == Counter(range(500)) for order in epochs)
    assert epochs[0] == epochs[2] != epochs[1]


def test_a_step_by_length_holds_what_it_would_hold_anyway() -> None:
    lengths = [index % 37 for index in range(500)]
    shuffled, by_length = (list(StepGroupedSampler(8, own, seed=3)) for own in ([1] * 500, lengths))
    for start in range(0, 500, 8):
        step = by_length[start : start + 8]
        assert set(step) == set(shuffled[start : start + 8])
        assert [lengths[index] for index in step] == sorted((lengths[index] for index in step), reverse=True)


def test_batches_by_length_have_less_padding(make_recipe: Callable[..., Recipe], data: Path, tmp_path: Path) -> None:
    padding = []
    for by_length in (False, "step", True):
        recipe = make_recipe(data={"group_by_length": by_length}, train={"gradient_accumulation": 4})
        session, rows = open_session(recipe, []), load_conversations(str(data / "train.json"))
        trainer = make_trainer(session, rows, None, tmp_path / "x", ProgressDisplay(QUIET))
        batches = [batch["attention_mask"] for batch in trainer.get_train_dataloader()]
        assert sum(len(batch) for batch in batches) == len(rows)
        padding.append(sum(int((batch == 0).sum()) for batch in batches))
    assert padding[2] < padding[0] / 2 and padding[1] < 0.8 * padding[0]


def test_lengths_are_those_of_batches(data: Path, processor: Any) -> None:
    rows, collator = load_conversations(str(data / "train.json")), Collator(processor, 128)
    assert lengths_of(rows, collator) == [len(collator([row])["input_ids"][0]) for row in rows]


@pytest.mark.long
def test_an_error_in_a_worker_is_the_same_as_in_the_run_itself(
    make_recipe: Callable[..., Recipe], data: Path, tmp_path: Path
) -> None:
    folder = Path(shutil.copytree(data, tmp_path / "data"))
    session = open_session(make_recipe(data={"num_workers": 1}), [])
    rows = load_conversations(str(folder / "train.json"))
    shutil.rmtree(folder / "images")
    for split in ("train", "evaluate"):
        trainer = make_trainer(session, rows, rows, tmp_path / split, ProgressDisplay(QUIET))
        with pytest.raises(UserError, match="An image cannot be read: no such file") as caught:
            getattr(trainer, split)()
        assert str(folder / "images") in caught.value.where and "Traceback" not in str(caught.value)


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Say what the machine has."""

    def set_up(cores: int = 16, shared: int = 8 << 30, method: str = "fork") -> None:
        monkeypatch.setattr(workers, "usable_cores", lambda: cores)
        monkeypatch.setattr(workers.shutil, "disk_usage", lambda path: SimpleNamespace(free=shared))
        monkeypatch.setattr(workers.multiprocessing, "get_start_method", lambda allow_none: method)

    return set_up


@pytest.mark.parametrize(
    ("facts", "samples", "expected"),
    [
        ({}, 5000, 4), ({"cores": 3}, 5000, 2), ({"cores": 1}, 5000, 0), ({}, 50, 0),
        ({"method": "spawn"}, 5000, 0), ({"shared": 64 << 20}, 5000, 0),
    ],
)  # fmt: skip
def test_by_default_there_are_as_many_workers_as_the_machine_has_room_for(
    machine: Callable[..., None], facts: dict[str, Any], samples: int, expected: int
) -> None:
    machine(**facts)
    assert loader_workers(Data(train="x").num_workers, samples) == expected


@pytest.mark.parametrize("asked", [0, 3])
def test_a_number_in_a_recipe_is_taken_as_it_is(machine: Callable[..., None], asked: int) -> None:
    machine(method="spawn", cores=1)
    assert loader_workers(Data(train="x", num_workers=asked).num_workers, 5) == asked
