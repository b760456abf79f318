"""Runs, adapters and exports of an earlier release keep loading, and compute what they computed then."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from rich.console import Console
from transformers import AutoModelForImageTextToText

from qmixlora.data import load_split
from qmixlora.evaluation import answer_rows, score
from qmixlora.export import Request, export
from qmixlora.loss import supervised_loss
from qmixlora.recipe import edited, load_recipe
from qmixlora.report.routing import read_routing
from qmixlora.session import Session, open_run
from qmixlora.training import train

RELEASE = Path(__file__).parents[1] / "fixtures" / "release_0_1"
RUNS = ("default", "conditional", "task", "lora")
ROUNDING = 1e-4  # relative: other processors sum in another order


@pytest.fixture
def release(tmp_path: Path) -> Path:
    """The release's folder with its runs, its paths those of this machine."""
    folder = tmp_path / "release"
    shutil.copytree(RELEASE, folder)
    for file in folder.rglob("*"):
        if file.suffix in {".json", ".jsonl", ".yaml"}:
            file.write_text(file.read_text(encoding="utf-8").replace("{FIXTURE}", str(folder)), encoding="utf-8")
    return folder


def losses(run: Path) -> dict[int, float]:
    """The training loss of every step in a run's log."""
    records = map(json.loads, (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines())
    return {record["step"]: record["loss"] for record in records if "loss" in record}


def loss_on(session: Session, rows: Any) -> float:
    with torch.no_grad():
        return float(supervised_loss(session.model, session.collator([rows[i] for i in range(len(rows))])))


@pytest.mark.parametrize("name", RUNS)
def test_an_old_run_gives_the_loss_and_the_answers_that_it_gave(release: Path, name: str) -> None:
    expected = json.loads((release / "runs" / name / "expected.json").read_text(encoding="utf-8"))
    session = open_run(release / "runs" / name)
    rows = load_split(session.recipe.data, "test")
    assert loss_on(session, rows) == pytest.approx(expected["loss"], rel=ROUNDING)
    answers = answer_rows(session, rows, batch_size=4, max_new_tokens=4)
    assert answers == expected["answers"]
    scores, then = score(rows, answers, "test"), expected["evaluation"]
    assert scores.mean == pytest.approx(then["mean_exact_match"])
    counted = {task: {"exact_match": own.score, "count": own.count} for task, own in scores.tasks.items()}
    assert counted == then["tasks"]


@pytest.mark.parametrize("name", [RUNS[0], *(pytest.param(name, marks=pytest.mark.long) for name in RUNS[1:])])
def test_the_first_steps_of_an_old_recipe_have_the_losses_that_they_had(release: Path, name: str) -> None:
    recipe = load_recipe(str(release / "runs" / name / "recipe.yaml"))
    short = edited(recipe, [f"train.output={release / 'again'}", "train.save_every="])
    # the schedule's length is that of the old run; the first steps are enough
    expected = losses(release / "runs" / name)
    again = losses(train(short, console=Console(quiet=True)))
    assert [again[step] for step in range(1, 6)] == pytest.approx(
        [expected[step] for step in range(1, 6)], rel=ROUNDING
    )


def test_an_old_run_is_resumed_from_its_checkpoint(release: Path) -> None:
    run = release / "runs" / "default"
    expected = losses(run)
    shutil.rmtree(run / "adapter")
    train(load_recipe(str(run / "recipe.yaml")), resume=True, console=Console(quiet=True))
    resumed = losses(run)
    assert list(resumed) == list(expected)
    assert [resumed[step] for step in range(31, 34)] == pytest.approx(
        [expected[step] for step in range(31, 34)], rel=1e-3
    )
    assert (run / "adapter" / "adapter_model.safetensors").is_file()


def test_the_routing_record_of_an_old_run_is_read(release: Path) -> None:
    summary = read_routing(release / "runs" / "default")
    assert len(summary.tasks) == 10 and len(summary.layers) == 14 and summary.steps[-1] == 60


def test_an_old_run_is_exported_from_its_record(release: Path) -> None:
    run = release / "runs" / "default"
    old = json.loads((run / "exports" / "digit-lora" / "fidelity.json").read_text(encoding="utf-8"))
    [fidelity] = export(run, Request(tasks=("digit",), polish=0), Console(quiet=True))
    new = fidelity.to_dict()
    for key in ("tasks", "rank", "split", "samples", "exact_match", "agreement"):
        assert new[key] == old[key], key
    assert new["loss"] == pytest.approx(old["loss"], rel=ROUNDING)


def test_an_old_export_is_opened_by_us_and_by_stock_peft(release: Path) -> None:
    folder = release / "runs" / "default" / "exports" / "digit-lora"
    session = open_run(folder)
    rows = load_split(session.recipe.data, "test")
    old = json.loads((folder / "fidelity.json").read_text(encoding="utf-8"))["loss"]["lora"]
    digits = rows.filter(lambda row: row["task"] == "digit")
    assert loss_on(session, digits) == pytest.approx(old, rel=ROUNDING)
    PeftModel.from_pretrained(AutoModelForImageTextToText.from_pretrained(release / "backbone"), folder)
