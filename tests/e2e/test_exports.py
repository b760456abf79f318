"""The command line on exports: they are made, evaluated and talked to."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from qmixlora.export import merge
from qmixlora.recipe import Recipe
from qmixlora.report import page
from qmixlora.training import train
from tests.conftest import CommandLine

FORMS = ("lora", "merged")


@pytest.fixture(scope="module")
def run(finished_run: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of this module's own, which gets exports."""
    return Path(shutil.copytree(finished_run("mixlora"), tmp_path_factory.mktemp("exports") / "run"))


@pytest.fixture(scope="module")
def reports(run: Path, qmixlora: CommandLine) -> dict[str, Any]:
    """What `qmixlora export` printed of an adapter and a merged checkpoint for one task, by form."""
    done = qmixlora("export", run, "--task", "digit", "--as", "lora", "--as", "merged", "--polish", 2, "--json")
    assert done.code == 0, done.stderr
    return dict(zip(FORMS, json.loads(done.stdout), strict=True))


@pytest.mark.parametrize("form", FORMS)
def test_export_prints_the_fidelity_that_it_writes(run: Path, reports: dict[str, Any], form: str) -> None:
    written = json.loads((run / "exports" / f"digit-{form}" / "fidelity.json").read_text())
    assert reports[form] == written and written["form"] == form


@pytest.mark.parametrize("form", FORMS)
def test_eval_of_an_export_gives_the_score_that_its_fidelity_has(
    qmixlora: CommandLine, run: Path, reports: dict[str, Any], form: str
) -> None:
    done = qmixlora("eval", run / "exports" / f"digit-{form}", "--json")
    assert done.code == 0, done.stderr
    result = json.loads(done.stdout)
    assert list(result["tasks"]) == ["digit"]
    assert result["mean"] == pytest.approx(reports[form]["exact_match"][form])


def test_rows_that_the_run_did_not_learn_are_told_by_all_that_read_them(
    qmixlora: CommandLine, make_recipe: Callable[..., Recipe], data: Path, tmp_path: Path
) -> None:
    file = Path(shutil.copytree(data, tmp_path / "data")) / "train.json"
    run = train(make_recipe(data={"train": str(file)}), console=Console(quiet=True))
    export = ["export", run, "--task", "digit", "--polish", 1, "--samples", 1]
    done = qmixlora(*export)
    assert done.code == 0 and "has changed since" not in done.stderr
    rows = json.loads(file.read_text())
    for row in rows:
        row["conversations"][-1]["value"] = "other"
    commands = [
        export,
        ["eval", run, "--split", "train", "--task", "digit"],
        ["eval", run / "exports" / "digit-lora", "--split", "train"],
        ["inspect", run, "--split", "train", "--interference", "--batches", 1],
    ]
    for number, command in enumerate(commands):
        changed = Path(shutil.copytree(data, tmp_path / f"data-{number}")) / "train.json"
        changed.write_text(json.dumps(rows))
        for recipe in (run / "recipe.yaml", run / "exports" / "digit-lora" / "recipe.yaml"):
            recipe.write_text(re.sub(r"train: .*train\.json", f"train: {changed}", recipe.read_text()))
        done = qmixlora(*command)
        assert done.code == 0 and done.stderr.count(f"{changed} has changed since") == 1, (command, done.stderr)


def test_what_is_printed_of_exports_does_not_wait_for_the_report(
    copied_run: Path, qmixlora: CommandLine, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Which takes seconds to draw, and may be interrupted."""

    def interrupted(run: Path) -> str:
        raise KeyboardInterrupt

    monkeypatch.setattr(page, "refresh_report", interrupted)
    done = qmixlora("export", copied_run, "--task", "digit", "--polish", 0, "--no-fingerprint", "--json")
    assert [report["form"] for report in json.loads(done.stdout)] == ["lora"]


def test_a_merged_checkpoint_answers(qmixlora: CommandLine, run: Path, reports: dict[str, Any], image: Path) -> None:
    merged = run / "exports" / "digit-merged"
    done = qmixlora("chat", merged, "--image", image, "--prompt", "what digit is written ?")
    assert done.code == 0, done.stderr


def test_a_merged_checkpoint_has_no_backbone_to_evaluate(
    qmixlora: CommandLine, run: Path, reports: dict[str, Any]
) -> None:
    done = qmixlora("eval", run / "exports" / "digit-merged", "--backbone")
    assert done.code == 2 and "no adapter to leave out" in done.stderr


def test_all_tasks_are_exported_with_a_table_of_their_fidelity(qmixlora: CommandLine, copied_run: Path) -> None:
    done = qmixlora("export", copied_run, "--all", "--polish", 0)
    printed = done.stdout + done.stderr
    words = ("reading", "where", "mean", "update error", "Score (exact), split test")
    assert done.code == 0 and all(word in printed for word in words), printed
    card = (copied_run / "exports" / "where-lora" / "README.md").read_text()
    assert "| | score (exact) | loss |" in card and "on the NF4 weights that it was trained on" in card


@pytest.mark.long
def test_an_export_in_the_place_of_another_is_told(qmixlora: CommandLine, copied_run: Path) -> None:
    options = ("--task", "digit", "--polish", 0, "--samples", 1)
    assert "is replaced" not in qmixlora("export", copied_run, *options).stdout
    done = qmixlora("export", copied_run, *options, "--rank", 2)
    assert done.code == 0 and "digit-lora is replaced (rank 4, now 2)" in done.stdout, done.stdout


def test_a_rank_of_the_projector_means_low_rank_factors(qmixlora: CommandLine, copied_run: Path) -> None:
    options = ("--task", "digit", "--polish", 0, "--samples", 1, "--no-fingerprint", "--projector-rank", 2)
    done = qmixlora("export", copied_run, *options, "--json")
    assert done.code == 0 and json.loads(done.stdout)[0]["projector"] == "low-rank", done.stderr
    assert [path.name for path in (copied_run / "exports").iterdir()] == ["digit-lora"]
    done = qmixlora("export", copied_run, *options, "--projector", "base")
    assert done.code == 2 and "Type --projector base alone, or --projector low-rank --projector-rank 2" in done.stderr


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ((), "--all"),
        (("--task", "juggling"), "no task 'juggling'"),
        (("--task", "digit", "--all"), "do not go together"),
    ],
    ids=["none", "unknown", "both"],
)
def test_export_says_which_tasks_it_can_export(
    qmixlora: CommandLine, run: Path, arguments: tuple[str, ...], words: str
) -> None:
    done = qmixlora("export", run, *arguments)
    assert done.code == 2 and words in done.stderr and "Traceback" not in done.stderr


def test_a_merged_checkpoint_that_computes_something_else_fails_the_check(
    qmixlora: CommandLine, copied_run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(merge, "add_update", lambda weight, update: None)
    done = qmixlora("export", copied_run, "--task", "digit", "--as", "merged", "--polish", 0)
    assert done.code == 1 and "does not compute what its adapter computes" in done.stdout + done.stderr
