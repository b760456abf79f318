"""Whether a mean is polished: decided on rows that the run was not trained on, and the better adapter stays.

The run here has two tasks with one question each, whose answers have two words. All samples of a task are then routed
alike: the mean of one task computes what the live model computes on its rows, and is wrong on the other's.
"""

from __future__ import annotations

import json
import shutil
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console

import qmixlora.export.adapters as adapters_module
from qmixlora.data import Collator
from qmixlora.export import Fidelity, export
from qmixlora.export.job import Job
from qmixlora.export.live import Live, measure_live
from qmixlora.export.polish import polish
from qmixlora.export.static import StaticAdapter, learned_by, read
from qmixlora.export.targets import Request
from qmixlora.recipe import Recipe
from qmixlora.session import open_tuned_run
from qmixlora.training import train
from tests.conftest import CommandLine

from .helpers import QUIET, edit_recipe, exported, recipe_of

QUESTIONS = {"color": "what color is the circle ?", "count": "how many green shapes are there ?"}
Ask = Callable[..., list[dict[str, Any]]]


@pytest.fixture(scope="session")
def ask(data: Path) -> Ask:
    """Samples of a task, all with its one question; under another task's name or with one wrong answer if told so."""

    def samples(task: str, *, called: str | None = None, answer: str | None = None) -> list[dict[str, Any]]:
        return [
            {
                "image": str(data / row["image"]),
                "task": called or task,
                "conversations": [
                    {"from": "human", "value": f"<image>\n{QUESTIONS[task]}"},
                    {"from": "gpt", "value": " ".join(2 * [answer or row["conversations"][1]["value"]])},
                ],
            }
            for row in json.loads((data / "train.json").read_text())
            if row["task"] == task
        ]

    return samples


def write(path: Path, rows: list[dict[str, Any]]) -> str:
    path.write_text(json.dumps(rows))
    return str(path)


@pytest.fixture(scope="session")
def trained(backbone: Path, ask: Ask, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("two-questions")
    values = {
        "model": {"id": str(backbone), "dtype": "float32"},
        "adapter": {"num_factors": 4, "r": 2, "alpha": 4, "dropout": 0.0},
        "data": {
            "train": write(folder / "train.json", [*ask("color"), *ask("count")]),
            "allow_outside": True,
            "max_length": 128,
        },
        "train": {
            "output": str(folder / "run"),
            "max_steps": 30,
            "micro_batch_size": 12,
            "gradient_accumulation": 1,
            "learning_rate": 1e-2,
            "max_new_tokens": 4,
        },
        "export": {"polish": 2},
    }
    return train(Recipe.model_validate(values), console=QUIET)


@pytest.fixture
def run(trained: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(trained, tmp_path / "run"))


def means_from(run: Path, rows: list[dict[str, Any]], **request: Any) -> Fidelity:
    """Export `color` with the mean over some rows."""
    return exported(run, calibration=write(run / "calibration.json", rows), **request)


def validate_on(run: Path, rows: list[dict[str, Any]]) -> None:
    edit_recipe(run, data__validation=write(run / "validation.json", rows))


def train_on(run: Path, rows: list[dict[str, Any]]) -> None:
    """Give the run other training rows than those that it was trained on."""
    edit_recipe(run, data__train=write(run / "train.json", rows))


def adapter_of(run: Path) -> StaticAdapter:
    return read(run / "exports" / "color-lora")


def equal(one: StaticAdapter, other: StaticAdapter) -> bool:
    return all(
        torch.equal(update.up_OK, other.updates[layer].up_OK)
        and torch.equal(update.down_KI, other.updates[layer].down_KI)
        for layer, update in one.updates.items()
    )


@pytest.fixture
def polishings(monkeypatch: pytest.MonkeyPatch) -> list[list[Any]]:
    """The rows of every polishing, which goes on as ever."""
    seen: list[list[Any]] = []

    def watched(session: Any, adapter: Any, rows: Any, *arguments: Any, **options: Any) -> None:
        seen.append(list(rows))
        polish(session, adapter, rows, *arguments, **options)

    monkeypatch.setattr(adapters_module, "polish", watched)
    return seen


def live_on(run: Path, *tasks: str) -> Live:
    session = open_tuned_run(run)
    assert isinstance(session.collator, Collator)
    job = Job(run, recipe_of(run), Request(tasks=tasks, together=True), QUIET, session.collator)
    (live,) = measure_live(job, session, learned_by(session.model))
    return live


@pytest.mark.long
def test_a_mean_that_is_right_where_it_was_not_trained_is_not_polished(
    run: Path, ask: Ask, polishings: list[Any]
) -> None:
    validate_on(run, ask("color"))
    assert means_from(run, ask("color")).polish_steps == 0 and polishings == []


def test_a_mean_that_is_right_in_training_and_wrong_in_validation_is_polished(
    run: Path, ask: Ask, polishings: list[Any]
) -> None:
    validate_on(run, ask("count", called="color"))
    fidelity = means_from(run, ask("color"))
    assert fidelity.split == "validation" and fidelity.decided_on == "validation"
    assert len(polishings) == 1


def test_with_validation_rows_it_is_polished_on_all_training_rows(run: Path, ask: Ask, polishings: list[Any]) -> None:
    validate_on(run, ask("count", called="color"))
    means_from(run, ask("color"))
    assert [len(rows) for rows in polishings] == [len(ask("color"))]


def test_a_mean_that_is_wrong_in_training_is_polished_without_validation_rows(
    run: Path, ask: Ask, polishings: list[Any]
) -> None:
    fidelity = means_from(run, ask("count", called="color"))
    assert fidelity.decided_on == "train, left out of polishing" and len(polishings) == 1


def test_a_loss_that_grew_is_enough_to_polish(run: Path, ask: Ask, polishings: list[Any]) -> None:
    """Answers of two words, cut after the first: nobody scores."""
    edit_recipe(run, train__max_new_tokens=1)
    validate_on(run, ask("count", called="color"))
    fidelity = means_from(run, ask("color"))
    assert fidelity.live.score == fidelity.measurements["lora"].score == 0.0
    assert len(polishings) == 1


@pytest.mark.parametrize("tasks", [("color",), ("color", "count")])
def test_without_validation_the_rows_that_decide_are_left_out_of_polishing(run: Path, tasks: tuple[str, ...]) -> None:
    check = live_on(run, *tasks).check
    assert check is not None and check.source == "train, left out of polishing"
    deciding, polished = ([repr(row) for row in rows] for rows in (check.rows, check.polish_on))
    assert not set(deciding) & set(polished)
    assert len(deciding) + len(polished) == 6 * len(tasks)
    assert set(check.rows["task"]) == set(check.polish_on["task"]) == set(tasks)


def test_of_a_mixture_every_task_decides_where_one_alone_has_validation_rows(run: Path, ask: Ask) -> None:
    validate_on(run, ask("color"))
    live = live_on(run, "color", "count")
    assert live.check is not None and live.check.source == "validation and train, left out of polishing"
    assert Counter(live.check.rows["task"]) == {"color": 6, "count": 2}
    assert Counter(live.check.polish_on["task"]) == {"color": 6, "count": 4}
    assert live.split == "validation" and live.unmeasured == ["count"]


def test_an_export_names_the_tasks_that_were_not_measured(run: Path, ask: Ask) -> None:
    validate_on(run, ask("color"))
    with (run / "said").open("w") as file:
        request = Request(tasks=("color", "count"), together=True, polish=0, samples=1, fingerprint=False)
        (fidelity,) = export(run, request, Console(file=file, width=300))
    assert "no sample of count is in the split validation; measured without." in (run / "said").read_text()
    assert fidelity.to_dict()["unmeasured"] == ["count"] and fidelity.samples == 1


def test_the_rows_of_a_polishing_are_those_that_do_not_decide(run: Path, ask: Ask, polishings: list[Any]) -> None:
    check = live_on(run, "color").check
    assert check is not None
    means_from(run, ask("count", called="color"))
    assert polishings == [list(check.polish_on)]


def test_a_polished_adapter_that_is_better_stays(run: Path, ask: Ask) -> None:
    mean = means_from(run, ask("count", called="color"), polish=0)
    assert mean.score < mean.live.score
    before = adapter_of(run)
    edit_recipe(run, export__polish=15)
    fidelity = means_from(run, ask("count", called="color"))
    assert fidelity.polish_steps == 15 and fidelity.score > mean.score
    assert not equal(adapter_of(run), before)


def test_a_mean_that_polishing_makes_worse_stays(run: Path, ask: Ask, polishings: list[Any]) -> None:
    """Polished on wrong answers."""
    validate_on(run, ask("color"))
    train_on(run, [*ask("color", answer="triangle"), *ask("count")])
    means_from(run, ask("count", called="color"), polish=0)
    mean = adapter_of(run)
    edit_recipe(run, export__polish=15)
    fidelity = means_from(run, ask("count", called="color"))
    assert len(polishings) == 1 and fidelity.polish_steps == 0
    assert equal(adapter_of(run), mean)


def test_steps_that_are_asked_for_are_taken_whatever_the_mean_lost(run: Path, ask: Ask) -> None:
    validate_on(run, ask("color"))
    fidelity = means_from(run, ask("color"), polish=3)
    assert fidelity.polish_steps == 3 and fidelity.decided_on is None


@pytest.mark.long
def test_steps_that_are_asked_for_stay_even_if_they_make_the_mean_worse(run: Path, ask: Ask) -> None:
    train_on(run, [*ask("color", answer="triangle"), *ask("count")])
    edit_recipe(run, data__test=write(run / "test.json", ask("color")))
    mean = means_from(run, ask("color"), polish=0)
    fidelity = means_from(run, ask("color"), polish=15)
    assert fidelity.measurements["lora"].loss > mean.measurements["lora"].loss
    assert fidelity.polish_steps == 15


@pytest.mark.long
def test_steps_on_the_command_line_are_steps_that_are_asked_for(run: Path, qmixlora: CommandLine) -> None:
    done = qmixlora("export", run, "--task", "color", "--polish", "3", "--json")
    (report,) = json.loads(done.stdout)
    assert (report["polish_steps"], report["decided_on"]) == (3, None)


@pytest.mark.parametrize(
    ("steps", "decided_on"), [(0, None), (2, "train, left out of polishing")], ids=["no polish", "polish"]
)
def test_fidelity_says_where_it_was_decided(run: Path, steps: int, decided_on: str | None) -> None:
    edit_recipe(run, export__polish=steps)
    exported(run)
    report = json.loads((run / "exports" / "color-lora" / "fidelity.json").read_text())
    assert report["decided_on"] == decided_on


def test_a_task_that_validation_lacks_is_decided_on_training_rows(run: Path, ask: Ask) -> None:
    edit_recipe(run, data__test=write(run / "test.json", ask("color")))
    validate_on(run, ask("count"))
    assert exported(run).decided_on == "train, left out of polishing"


def test_a_task_with_a_single_training_row_keeps_its_mean(run: Path, ask: Ask) -> None:
    """There is nothing to polish on besides the row that decides."""
    train_on(run, [ask("color")[0], *ask("count")])
    assert means_from(run, ask("count", called="color")).polish_steps == 0
