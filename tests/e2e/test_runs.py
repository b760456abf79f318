"""The command line on a run: train, resume, eval, inspect, chat."""

from __future__ import annotations

import json
import resource
from collections.abc import Callable
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file

from tests.conftest import CommandLine

FinishedRun = Callable[[str], Path]
METHODS = ("mixlora", "lora")


@pytest.mark.parametrize("method", METHODS)
def test_train_writes_a_run_that_has_everything(
    qmixlora: CommandLine, recipe_file: Path, tmp_path: Path, method: str
) -> None:
    done = qmixlora("train", recipe_file, f"adapter.method={method}")
    assert done.code == 0, done.stderr
    assert "step     4/4" in done.stdout
    names = ("recipe.yaml", "adapter/adapter_config.json", "adapter/adapter_model.safetensors", "metrics.jsonl")
    for name in (*names, "report.html"):
        assert (tmp_path / "run" / name).is_file(), name


def test_train_goes_on_from_the_last_checkpoint(qmixlora: CommandLine, recipe_file: Path) -> None:
    assert qmixlora("train", recipe_file, "train.save_every=2").code == 0
    done = qmixlora("train", recipe_file, "train.save_every=2", "train.max_steps=6", "--resume")
    assert done.code == 0, done.stderr
    assert "step     5/6" in done.stdout and "step     4/6" not in done.stdout


def test_a_dry_run_prints_the_resolved_recipe_and_trains_nothing(
    qmixlora: CommandLine, recipe_file: Path, tmp_path: Path
) -> None:
    done = qmixlora("train", recipe_file, "train.seed=7", "--dry-run")
    assert done.code == 0 and "seed: 7" in done.stdout and not (tmp_path / "run").exists()


@pytest.mark.parametrize("method", METHODS)
def test_eval_prints_the_scores_that_it_writes(qmixlora: CommandLine, finished_run: FinishedRun, method: str) -> None:
    run = finished_run(method)
    done = qmixlora("eval", run, "--json")
    assert done.code == 0, done.stderr
    result = json.loads(done.stdout)
    assert result == json.loads((run / "evaluation.json").read_text())
    assert result["split"] == "test" and len(result["tasks"]) == 10
    kept = {"score", "count", "metric", "interval", "cut", "tolerance"}
    assert all(task.keys() == kept for task in result["tasks"].values())
    mean = sum(task["score"] for task in result["tasks"].values()) / 10
    assert result["mean"] == pytest.approx(mean)


@pytest.mark.parametrize("method", METHODS)
def test_eval_of_one_task_and_the_backbone_alone(qmixlora: CommandLine, finished_run: FinishedRun, method: str) -> None:
    done = qmixlora("eval", finished_run(method), "--task", "digit", "--backbone")
    assert done.code == 0 and "digit" in done.stdout and "color" not in done.stdout


@pytest.mark.long
def test_every_split_and_model_has_results_of_its_own(qmixlora: CommandLine, copied_run: Path) -> None:
    for options in ((), ("--split", "train"), ("--backbone",), ("--split", "train", "--backbone")):
        assert qmixlora("eval", copied_run, *options).code == 0
    names = ["", "-train", "-test-backbone", "-train-backbone"]
    results = [json.loads((copied_run / f"evaluation{name}.json").read_text()) for name in names]
    assert [result["split"] for result in results] == ["test", "train", "test", "train"]
    assert results[0]["tasks"]["digit"]["count"] == 2 and results[1]["tasks"]["digit"]["count"] == 6


def test_other_scores_are_not_replaced_in_silence(qmixlora: CommandLine, copied_run: Path) -> None:
    (copied_run / "evaluation.json").unlink(missing_ok=True)
    first, again = (qmixlora("eval", copied_run).stdout for _ in range(2))
    (copied_run / "evaluation.json").write_text("{}")
    assert "Written to" in first and "has the same scores already" in again
    assert "in place of other scores" in qmixlora("eval", copied_run).stdout


def test_scores_are_printed_where_they_cannot_be_written(qmixlora: CommandLine, copied_run: Path) -> None:
    (copied_run / "evaluation.json").unlink(missing_ok=True)
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100, before[1]))
    try:
        done = qmixlora("eval", copied_run, "--json")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert json.loads(done.stdout)["split"] == "test"
    assert done.code == 2 and "The scores cannot be written" in done.stderr and "evaluation.json" in done.stderr


def test_eval_names_the_tasks_when_one_is_not_among_them(qmixlora: CommandLine, finished_run: FinishedRun) -> None:
    done = qmixlora("eval", finished_run("mixlora"), "--task", "juggling")
    assert done.code == 2 and "juggling" in done.stderr and "digit" in done.stderr


def test_eval_says_by_which_recipe_a_file_is_read(
    qmixlora: CommandLine, finished_run: FinishedRun, tmp_path: Path
) -> None:
    run, table = finished_run("mixlora"), tmp_path / "table.csv"
    table.write_text("question,answer\nwhat ?,red\n")
    done = qmixlora("eval", run, "--data", table)
    assert done.code == 2 and "set data.columns: {question: question, answer: answer}" in done.stderr
    assert f"{table} is read as the run's own data, by the keys of `data` in {run / 'recipe.yaml'}." in done.stderr


def test_eval_refuses_a_folder_that_is_no_run(qmixlora: CommandLine, tmp_path: Path) -> None:
    done = qmixlora("eval", tmp_path)
    assert done.code == 2 and "not the folder of a finished run" in done.stderr


@pytest.mark.parametrize("rename", [lambda key: key.replace("layers.1.", "layers.7."), lambda key: None])
def test_eval_refuses_an_adapter_that_does_not_fit_the_backbone(
    qmixlora: CommandLine, copied_run: Path, rename: Callable[[str], str | None]
) -> None:
    """The tensors of a layer belong to another one, or are not there."""
    weights = copied_run / "adapter" / "adapter_model.safetensors"
    names = {key: rename(key) if "layers.1." in key else key for key in load_file(weights)}
    save_file({name: load_file(weights)[key] for key, name in names.items() if name is not None}, weights)
    done = qmixlora("eval", copied_run)
    assert done.code == 2 and "does not fit the backbone" in done.stderr


@pytest.mark.parametrize("method", METHODS)
def test_inspect_prints_the_interference_that_it_writes_and_draws(
    qmixlora: CommandLine, finished_run: FinishedRun, method: str
) -> None:
    run = finished_run(method)
    done = qmixlora("inspect", run, "--interference", "--batches", 2, "--json")
    assert done.code == 0, done.stderr
    measured = json.loads(done.stdout)
    assert measured == json.loads((run / "interference.json").read_text())
    assert len(measured["tasks"]) == len(measured["mean"]["A"]) == len(measured["mean"]["B"][0]) == 10
    assert (run / "figures" / "interference.png").is_file()


def test_inspect_draws_the_routing_of_a_run(qmixlora: CommandLine, finished_run: FinishedRun) -> None:
    run = finished_run("mixlora")
    done = qmixlora("inspect", run, "--routing")
    assert done.code == 0 and "entropy" in done.stdout and "Dead factors" in done.stdout, done.stderr
    assert len(list((run / "figures").glob("routing-*.png"))) == 3


def test_plain_lora_has_no_routing_to_inspect(qmixlora: CommandLine, finished_run: FinishedRun) -> None:
    done = qmixlora("inspect", finished_run("lora"), "--routing")
    assert done.code == 2 and "no record of its routing" in done.stderr


def test_inspect_shows_samples_with_their_image_tokens_counted(qmixlora: CommandLine, recipe_file: Path) -> None:
    done = qmixlora("inspect", recipe_file, "--samples", "1")
    assert done.code == 0 and "[4 image tokens]" in done.stdout, done.stderr


def test_inspect_prints_samples_as_json(qmixlora: CommandLine, recipe_file: Path) -> None:
    done = qmixlora("inspect", recipe_file, "--samples", "2", "--json")
    assert [sample["task"] for sample in json.loads(done.stdout)] == ["digit", "count"]


@pytest.mark.parametrize("options", [(), ("--no-history",)], ids=str)
@pytest.mark.parametrize("method", METHODS)
def test_chat_answers_until_an_empty_line(
    qmixlora: CommandLine, finished_run: FinishedRun, image: Path, method: str, options: tuple[str, ...]
) -> None:
    questions = "what digit is written ?\nhow big is the circle ?\n\n"
    done = qmixlora("chat", finished_run(method), "--image", image, *options, stdin=questions)
    assert done.code == 0, done.stderr
    assert done.stdout.count(">") == 3


def test_chat_names_an_image_that_is_missing(qmixlora: CommandLine, finished_run: FinishedRun, tmp_path: Path) -> None:
    done = qmixlora("chat", finished_run("mixlora"), "--image", tmp_path / "none.png", "--prompt", "what ?")
    assert done.code == 2 and "no such file" in done.stderr and "none.png" in done.stderr


@pytest.mark.long
def test_a_run_goes_on_and_begins_others_by_its_folder(qmixlora: CommandLine, copied_run: Path, tmp_path: Path) -> None:
    assert "--resume" in qmixlora("train", copied_run).stderr
    done = qmixlora("train", copied_run, "--resume")
    assert done.code == 0 and "Nothing is left to do" in done.stdout, done.stderr
    done = qmixlora("train", copied_run, "--resume", "train.max_steps=5")
    assert done.code == 0 and "step     5/5" in done.stdout, done.stderr
    recipe, new = copied_run / "recipe.yaml", tmp_path / "new"
    done = qmixlora("train", recipe, f"train.output={new}", "--init-from", copied_run)
    assert done.code == 0 and (new / "adapter" / "adapter_model.safetensors").is_file(), done.stderr
    done = qmixlora("train", recipe, "--resume", "--init-from", copied_run)
    assert done.code == 2 and "--resume and --init-from do not go together" in done.stderr
