"""Brackets in the names of tasks and folders are text, and no markup of the terminal."""

from __future__ import annotations

import io
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from qmixlora.cli import compare, evaluate, inspect
from rich.console import Console
from rich.table import Table

from qmixlora.data import Conversation
from qmixlora.evaluation import Scores, score
from qmixlora.evaluation.comparison import compare as compared
from tests.conftest import CommandLine

NAMES = ("step [/1]", "[bold]x[/bold]", "[red]")


def row(task: str) -> Conversation:
    turns = [{"role": "user", "text": "q"}, {"role": "assistant", "text": "4"}]
    return {"task": task, "turns": turns, "images": []}


def scores() -> Scores:
    return score([row(name) for name in NAMES for _ in range(2)], ["4"] * 2 * len(NAMES), "file-[/f]")


@pytest.mark.parametrize(
    "table",
    [
        lambda: evaluate._table(scores()),
        lambda: compare._table(compared({name: scores() for name in NAMES}), "file-step [/1]"),
        lambda: inspect._interference_table("A", list(NAMES), [[0.0] * len(NAMES)] * len(NAMES)),
    ],
    ids=["eval", "compare", "inspect"],
)
def test_tables_show_the_names_of_tasks_as_they_are(table: Callable[[], Table]) -> None:
    out = io.StringIO()
    Console(file=out, width=160).print(table())
    assert all(name in out.getvalue() for name in NAMES)


@pytest.mark.long
def test_commands_show_paths_as_they_are(
    qmixlora: CommandLine, finished_run: Callable[[str], Path], tmp_path: Path
) -> None:
    run = tmp_path / "a [" / "b]"  # [/b] is an end of markup that was never begun
    shutil.copytree(finished_run("mixlora"), run)
    other = shutil.copytree(run, tmp_path / "other [bold]")
    for words in (("eval", run, other), ("compare", run, other), ("inspect", run, "--routing")):
        done = qmixlora(*words)
        assert done.code == 0, done.stderr
        told = done.stdout.replace("\n", "") if words[0] == "compare" else done.stdout
        assert "[/b]" in told, told
    assert (run / "predictions.jsonl").is_file()
