"""From a score to what was wrong, and from two runs to whether one is better."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.conftest import CommandLine


@pytest.fixture(scope="module")
def evaluated(qmixlora: CommandLine, finished_run: Callable[[str], Path]) -> dict[str, Path]:
    """Two finished runs whose test split was evaluated."""
    runs = {method: finished_run(method) for method in ("mixlora", "lora")}
    assert qmixlora("eval", *runs.values()).code == 0
    return runs


def test_every_answer_is_kept_beside_the_scores(evaluated: dict[str, Path]) -> None:
    run = evaluated["mixlora"]
    lines = [json.loads(line) for line in (run / "predictions.jsonl").read_text(encoding="utf-8").splitlines()]
    scores = json.loads((run / "evaluation.json").read_text(encoding="utf-8"))
    assert [line["row"] for line in lines] == list(range(sum(task["count"] for task in scores["tasks"].values())))
    digits = [line["score"] for line in lines if line["task"] == "digit"]
    assert scores["tasks"]["digit"]["score"] == pytest.approx(sum(digits) / len(digits))
    assert all(Path(line["images"][0]).is_file() and line["question"] and line["references"] for line in lines)
    assert all(0 < line["seconds"] < 60 for line in lines)


def test_wrong_answers_are_shown_with_question_expectation_and_image(
    qmixlora: CommandLine, evaluated: dict[str, Path]
) -> None:
    done = qmixlora("eval", evaluated["mixlora"], "--task", "digit", "--wrong", "2")
    lines = (evaluated["mixlora"] / "predictions.jsonl").read_text(encoding="utf-8").splitlines()
    wrong = [one for one in map(json.loads, lines) if one["task"] == "digit" and one["score"] == 0]
    assert wrong, "a run of a few steps knows no digits"
    assert f"{wrong[0]['question']}\n  said {wrong[0]['answer'].strip() or 'nothing'}" in done.stdout
    assert f"expected {wrong[0]['references'][0]}\n  {wrong[0]['images'][0]}" in done.stdout
    assert done.stdout.count("said ") == min(2, len(wrong))


def test_any_file_is_evaluated_and_has_results_of_its_own(
    qmixlora: CommandLine, evaluated: dict[str, Path], tmp_path: Path
) -> None:
    run = evaluated["lora"]
    images = json.loads((run / "predictions.jsonl").read_text(encoding="utf-8").splitlines()[0])["images"]
    turns = [{"from": "human", "value": "<image>\nwhat digit ?"}, {"from": "gpt", "value": "seven"}]
    shutil.copy(images[0], tmp_path / "digit.png")
    rows = [{"image": "digit.png", "task": "digit", "conversations": turns}]
    (tmp_path / "test.json").write_text(json.dumps(rows), encoding="utf-8")
    before = (run / "evaluation.json").read_bytes()
    assert qmixlora("eval", run, "--data", tmp_path / "test.json").code == 0
    assert json.loads((run / "evaluation-file-test.json").read_text())["tasks"]["digit"]["count"] == 1
    assert (run / "predictions-file-test.jsonl").is_file() and (run / "evaluation.json").read_bytes() == before


def test_answers_that_are_cut_are_told_before_and_after(
    qmixlora: CommandLine, evaluated: dict[str, Path], tmp_path: Path
) -> None:
    rows = [{"messages": [{"role": "user", "content": "what ?"}, {"role": "assistant", "content": "red " * 40}]}]
    (tmp_path / "long.json").write_text(json.dumps(rows), encoding="utf-8")
    shutil.copytree(evaluated["lora"], run := tmp_path / "run")
    recipe = (run / "recipe.yaml").read_text(encoding="utf-8")
    (run / "recipe.yaml").write_text(re.sub("max_new_tokens: .*", "max_new_tokens: 1", recipe), encoding="utf-8")
    done = qmixlora("eval", run, "--data", tmp_path / "long.json", "--wrong", "1")
    assert done.code == 0, done.stderr
    assert "1 of 1 answers are longer" in done.stdout and "set train.max_new_tokens: 41" in done.stdout
    assert "as they are: 1 of 1 answers." in done.stdout and " (cut), expected" in done.stdout
    assert json.loads((run / "evaluation-file-long.json").read_text())["tasks"]["all"]["cut"] == 1


def test_runs_are_compared_by_what_was_kept_of_them(qmixlora: CommandLine, evaluated: dict[str, Path]) -> None:
    done = qmixlora("compare", *evaluated.values(), "--json")
    assert done.code == 0, done.stderr
    compared = json.loads(done.stdout)
    first, second = map(str, evaluated.values())
    points = compared["scores"][second]["mean"] - compared["scores"][first]["mean"]
    assert compared["differences"][second]["mean"]["points"] == pytest.approx(points)
    told = qmixlora("compare", *evaluated.values())
    assert told.code == 0 and "mean over tasks" in told.stdout and f"({points:+.3f})" in told.stdout


def test_a_run_is_compared_with_its_backbone_and_the_blind_guess(
    qmixlora: CommandLine, evaluated: dict[str, Path]
) -> None:
    run = evaluated["mixlora"]
    assert qmixlora("eval", run, "--backbone").code == 0
    done = qmixlora("compare", run, "--backbone", "--blind", "--json")
    assert done.code == 0, done.stderr
    differences = json.loads(done.stdout)["differences"]
    assert list(differences) == [f"backbone of {run}", "blind guess"]
    assert differences["blind guess"]["mean"]["points"] > 0, "a run of a few steps knows less"


def test_a_blind_guess_is_made_for_splits_of_the_recipe_alone(
    qmixlora: CommandLine, evaluated: dict[str, Path], tmp_path: Path
) -> None:
    run = evaluated["lora"]
    turns = [{"role": "user", "content": "what colour?"}, {"role": "assistant", "content": "red"}]
    rows = [{"messages": turns, "task": "color"}]
    (tmp_path / "six.json").write_text(json.dumps(rows), encoding="utf-8")
    assert qmixlora("eval", run, "--data", tmp_path / "six.json").code == 0
    done = qmixlora("compare", run, "--blind", "--split", "file-six")
    assert done.code == 2 and "which file-six is not" in done.stderr and "Leave --blind out" in done.stderr


def test_what_was_not_evaluated_is_not_compared(qmixlora: CommandLine, evaluated: dict[str, Path]) -> None:
    done = qmixlora("compare", *evaluated.values(), "--split", "train")
    assert done.code == 2 and f"qmixlora eval {evaluated['mixlora']} --split train" in done.stderr
    assert qmixlora("compare", evaluated["lora"], evaluated["lora"]).code == 2
    assert qmixlora("compare", evaluated["lora"]).code == 2


def test_predictions_that_a_crash_cut_short_are_refused(
    qmixlora: CommandLine, evaluated: dict[str, Path], tmp_path: Path
) -> None:
    copied = Path(shutil.copytree(evaluated["lora"], tmp_path / "copied"))
    (copied / "predictions.jsonl").write_text('{"row": 0', encoding="utf-8")
    done = qmixlora("compare", evaluated["lora"], copied)
    assert done.code == 2 and str(copied / "predictions.jsonl") in done.stderr and "eval" in done.stderr
