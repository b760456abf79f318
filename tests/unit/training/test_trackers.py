"""Trackers get the numbers of a run and pictures of answers: real packages, offline, where they are installed."""

from __future__ import annotations

import importlib.util
import json
import sqlite3
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from qmixlora.errors import UserError
from qmixlora.files import read_log
from qmixlora.recipe import Recipe
from qmixlora.training import train

from .helpers import QUIET

TOLD = {"loss", "learning_rate", "grad_norm", "memory_gib", "routing_entropy", "score", "score_digit"}


@pytest.fixture
def run(make_recipe: Callable[..., Recipe], data: Path) -> Callable[[str], Path]:
    """A run that reports to a tracker."""

    def made(tracker: str) -> Path:
        if importlib.util.find_spec(tracker) is None:
            pytest.skip(f"{tracker} is not installed")
        spec = {"eval_every": 2, "eval_generate": 10, "report_to": [tracker]}
        return train(make_recipe(data={"validation": str(data / "test.json")}, train=spec), console=QUIET)

    return made


def told(names: Any) -> set[str]:
    return {name.split("/")[-1].removeprefix("eval_") for name in names}


def test_tensorboard_has_numbers_and_pictures_in_the_folder_of_the_run(run: Callable[[str], Path]) -> None:
    folder = run("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(folder / "tensorboard"))
    events.Reload()
    assert told(events.Tags()["scalars"]) >= TOLD
    assert [image.step for image in events.Images("answers")] == [2, 4]
    assert events.Images("answers")[0].width > 600


def test_wandb_has_them_offline(run: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {"WANDB_MODE": "offline", "WANDB_DIR": str(tmp_path), "WANDB_SILENT": "true"}.items():
        monkeypatch.setenv(name, value)
    run("wandb")
    import wandb

    assert wandb.run is not None and told(wandb.run.summary.keys()) >= TOLD
    wandb.finish()
    [picture, *_] = (tmp_path / "wandb").rglob("media/images/answers*.png")
    with Image.open(picture) as image:
        assert image.width > 600


def test_mlflow_has_them_in_a_file(run: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", (tmp_path / "kept").as_uri())
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    run("mlflow")
    assert told(path.name for path in (tmp_path / "kept").rglob("metrics/**/*")) >= TOLD
    assert len(list(tmp_path.rglob("answers-*.png"))) == 2


def test_trackio_has_them_on_this_machine(
    run: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TRACKIO_DIR", str(tmp_path / "trackio"))
    run("trackio")
    [store] = (tmp_path / "trackio").glob("*.db")
    with sqlite3.connect(store) as database:
        logged = [json.loads(text) for (text,) in database.execute("select metrics from metrics")]
    assert told(key for one in logged for key in one) >= TOLD
    assert list((tmp_path / "trackio").rglob("*.png"))


def test_memory_entropy_and_scores_stand_in_the_log_of_every_run(
    make_recipe: Callable[..., Recipe], data: Path
) -> None:
    spec = {"eval_every": 2, "eval_generate": 10}
    folder = train(make_recipe(data={"validation": str(data / "test.json")}, train=spec), console=QUIET)
    assert told(key for one in read_log(folder / "metrics.jsonl") for key in one) >= TOLD


def test_a_tracker_that_is_not_installed_is_told_before_the_data_is_read(
    make_recipe: Callable[..., Recipe], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(UserError, match="The package of wandb is not installed"):
        train(make_recipe(data={"train": "nowhere.json"}, train={"report_to": ["wandb"]}), console=QUIET)
