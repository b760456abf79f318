"""What a report takes from the files of a run."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest

from qmixlora.recipe import validate
from qmixlora.report.contents import ExportFidelity
from qmixlora.report.record import RunRecord

VALUES = {"model": {"id": "someone/model"}, "data": {"train": "train.json"}, "train": {"gradient_accumulation": 2}}
RECIPE = validate(VALUES, "test")
FIDELITY = {"form": "lora", "rank": 4, "polish_steps": 0, "split": "test", "exact_match": {"live": 1, "lora": 0.5}}


def speeds(
    folder: Path, logs: Sequence[Mapping[str, Any]], history: Sequence[Mapping[str, Any]] = ()
) -> list[tuple[int, float]]:
    """Those of a run with these logs and this history."""
    (folder / "recipe.yaml").write_text(RECIPE.to_yaml(), encoding="utf-8")
    for name, lines in (("metrics.jsonl", logs), ("history.jsonl", history)):
        (folder / name).write_text("".join(f"{json.dumps(line)}\n" for line in lines), encoding="utf-8")
    return list(RunRecord.read(folder).speeds())


def test_the_speed_is_by_the_samples_that_were_logged(tmp_path: Path) -> None:
    """Micro-batches that are filled by tokens, and several processes, take other numbers than the recipe's product."""
    logs = [{"step": 1, "loss": 1.0, "seconds": 1.0, "samples": 12}, {"step": 2, "loss": 1.0, "seconds": 2.0}]
    assert speeds(tmp_path, logs) == [(1, 12.0), (2, 2.0)]  # the second as earlier releases logged it


@pytest.mark.parametrize("says_start", [True, False])
@pytest.mark.parametrize("first", [3.0, 30.0])  # the seconds of the second start are fewer or more
def test_the_speed_is_of_one_start(tmp_path: Path, first: float, says_start: bool) -> None:
    """Whose seconds count from 0: new records say which start they are of, of earlier ones the history does."""
    own = [
        {"step": 10, "loss": 1.0, "seconds": 20.0, "samples": 100, "start": 0},
        {"step": 20, "loss": 1.0, "seconds": first, "samples": 60, "start": 14},
        {"step": 30, "loss": 1.0, "seconds": first + 20, "start": 14},
    ]
    logs = [{name: value for name, value in one.items() if says_start or name != "start"} for one in own]
    # a start at 17, whose checkpoint was damaged later on
    events = [("started", 0), ("resumed", 17), ("resumed", 14), ("finished", 20)]
    history = [{"event": event, "step": step} for event, step in events]
    assert speeds(tmp_path, logs, history) == [(10, 5.0), (20, 60 / first), (30, 1.0)]


def test_the_speed_leaves_evaluation_out(tmp_path: Path) -> None:
    """Also where it lies between two logs, whose samples are those of both sides of it."""
    logs = [
        {"step": 5, "eval_loss": 1.0, "seconds": 25.0, "eval_runtime": 20.0, "start": 0},
        {"step": 10, "loss": 1.0, "seconds": 30.0, "samples": 20, "start": 0},
        {"step": 10, "eval_loss": 1.0, "seconds": 50.0, "eval_runtime": 20.0, "start": 10},  # made up for by a new one
        {"step": 20, "loss": 1.0, "seconds": 60.0, "samples": 20, "start": 10},
    ]
    assert speeds(tmp_path, logs) == [(10, 2.0), (20, 0.5)]


def test_each_start_of_a_run_counts_its_own_seconds(tmp_path: Path) -> None:
    times = [(1, 10.0), (2, 20.0), (3, 10.1), (4, 20.1), (5, 1.0)]  # resumed from step 2, and from step 4
    logs = [{"step": step, "loss": 1.0, "seconds": seconds, "samples": 20} for step, seconds in times]
    events = [{"event": "started", "step": 0}, {"event": "resumed", "step": 2}, {"event": "resumed", "step": 4}]
    found = [(step, round(speed, 2)) for step, speed in speeds(tmp_path, logs, events)]
    assert found == [(1, 2.0), (2, 2.0), (3, 1.98), (4, 2.0), (5, 20.0)]


@pytest.mark.parametrize("name", ["run", "run \udcff"])
def test_an_export_is_read_whatever_its_runs_name_and_its_numbers_are(tmp_path: Path, name: str) -> None:
    """A name may be no text, a number none, and the keys more than are shown."""
    (tmp_path / "recipe.yaml").write_text(RECIPE.to_yaml(), encoding="utf-8")
    export = tmp_path / "exports" / "s-lora"
    export.mkdir(parents=True)
    more = {"folder": f"/{name}/exports/s-lora", "agreement": {"lora": 1}, "update_error": {"mean": float("nan")}}
    (export / "fidelity.json").write_text(json.dumps(FIDELITY | more | {"notes": []}))
    record = RunRecord.read(tmp_path)
    [read] = record.exports
    assert isinstance(read, ExportFidelity) and read.name == "s-lora" and record.damaged == []
