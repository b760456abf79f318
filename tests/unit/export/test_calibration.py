"""The mean mixing matrices of an export: from the run's record, from a file of samples, from training rows."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from qmixlora.data import indices_by_task, load_split, only_tasks
from qmixlora.errors import UserError
from qmixlora.export.calibration import calibrate
from qmixlora.export.low_rank import LowRank
from qmixlora.export.measurement import measure_updates
from qmixlora.export.static import learned_by, read
from qmixlora.manifest import MANIFEST
from qmixlora.mixlora.routing_record import RoutingRecord, mixture_layers
from qmixlora.recipe import Recipe
from qmixlora.session import open_session, open_tuned_run
from tests.unit.mixlora.conversations import mixed_rows

from .helpers import Q_PROJ, TASKS, edit_recipe, exported, rows_of

LAYER = "model.language_model.layers.1.mlp.gate_proj"


def exported_update(run: Path, **request: Any) -> LowRank:
    exported(run, **request)
    return read(run / "exports" / "color-lora").updates[Q_PROJ]


def test_a_pass_gives_the_mean_of_what_each_sample_gets(make_recipe: Callable[..., Recipe]) -> None:
    session = open_session(make_recipe(train={"eval_batch_size": 7}), [])
    rows = load_split(session.recipe.data, "train")
    tasks = list(indices_by_task(rows))
    mean_LTEF = calibrate(session, rows, tasks)
    assert len(mean_LTEF) == 14
    index = mixture_layers(session.model).index(LAYER)
    session.model.eval()
    for number, task in enumerate(tasks):
        selections = []
        for row in only_tasks(rows, [task], "train"):
            session.model(**session.collator([row]))
            selections.append(session.model.base_model.last_selection()[index, 0])
        expected_EF = torch.stack(selections).mean(dim=0)
        torch.testing.assert_close(mean_LTEF[index, number], expected_EF)


def test_a_pass_counts_every_answer_for_its_own_task(make_recipe: Callable[..., Recipe]) -> None:
    session = open_session(make_recipe(train={"eval_batch_size": 2}), [])
    rows = mixed_rows(session.recipe)  # color, digit, color; digit; digit, digit
    mean_LTEF = calibrate(session, rows, ["color", "digit"])
    selections = []
    for row in rows:
        session.model.eval()(**session.collator([row]))
        selections.append(session.model.base_model.last_selection())
    own_LNEF = torch.cat(selections, dim=1)
    torch.testing.assert_close(mean_LTEF[:, 0], own_LNEF[:, [0, 2]].mean(dim=1))
    torch.testing.assert_close(mean_LTEF[:, 1], own_LNEF[:, [1, 3, 4, 5]].mean(dim=1))


def test_a_pass_leaves_out_answers_of_tasks_that_it_is_not_for(make_recipe: Callable[..., Recipe]) -> None:
    """Those of a task that is learned nowhere are in the history of others."""
    session = open_session(make_recipe(), [])
    rows = mixed_rows(session.recipe)[:1]  # color, digit, color
    mean_LTEF = calibrate(session, rows, ["color"])
    session.model.eval()(**session.collator(rows))
    torch.testing.assert_close(mean_LTEF[:, 0], session.model.base_model.last_selection()[:, [0, 2]].mean(dim=1))
    assert not calibrate(session, rows, ["shape"]).any()


def test_a_pass_leaves_the_model_in_its_mode_and_tells_how_far_it_is(make_recipe: Callable[..., Recipe]) -> None:
    session = open_session(make_recipe(train={"eval_batch_size": 7}), [])
    rows = only_tasks(load_split(session.recipe.data, "train"), ["color", "count"], "train")
    session.model.train()
    told: list[tuple[int, int]] = []
    calibrate(session, rows, TASKS, on_progress=lambda done, total: told.append((done, total)))
    assert session.model.training and told == [(7, 12), (12, 12)]


def test_calibration_takes_the_means_of_samples_that_the_run_never_saw(run: Path, data: Path) -> None:
    counted = exported_update(run)
    calibrated = exported_update(run, calibration=str(data / "test.json"))
    assert not torch.equal(counted.up_OK, calibrated.up_OK)
    session = open_tuned_run(run)
    learned = learned_by(session.model)
    mean_LEF = measure_updates(session, learned, rows_of(run, "color")).mix_LEF
    torch.testing.assert_close(calibrated.up_OK, learned.adapter(mean_LEF).updates[Q_PROJ].up_OK)


def test_a_task_without_samples_to_calibrate_on_is_named(run: Path, data: Path, tmp_path: Path) -> None:
    edit_recipe(run, data__allow_outside=True)
    rows = [row for row in json.loads((data / "test.json").read_text()) if row["task"] == "color"]
    only_color = tmp_path / "only-color.json"
    only_color.write_text(json.dumps([{**row, "image": str(data / row["image"])} for row in rows]))
    with pytest.raises(UserError, match="no sample of 'count'"):
        exported(run, tasks=TASKS, calibration=str(only_color))


def test_a_task_without_samples_in_the_record_is_calibrated_on_its_training_rows(run: Path) -> None:
    counted = exported_update(run)
    tensors = load_file(run / "routing.safetensors")
    with safe_open(run / "routing.safetensors", "pt") as file:
        metadata = file.metadata()
    tensors["count"][json.loads(metadata["tasks"]).index("color")] = 0
    tensors[f"{Q_PROJ}.mean"].zero_()
    save_file(tensors, run / "routing.safetensors", metadata)
    (run / MANIFEST).unlink()
    again = exported_update(run)
    assert again.up_OK.abs().sum() > 0 and not torch.equal(again.up_OK, counted.up_OK)


def test_a_record_without_a_snapshot_has_samples_of_no_task(run: Path) -> None:
    with safe_open(run / "routing.safetensors", "pt") as file:
        tasks = json.loads(file.metadata()["tasks"])
    RoutingRecord(tasks).save(run / "routing.safetensors")
    (run / MANIFEST).unlink()
    assert exported_update(run).up_OK.abs().sum() > 0
