"""The targets of an export: names of folders, shares of tasks, mistakes."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from qmixlora.errors import UserError
from qmixlora.export import Request, export, exported_tasks
from qmixlora.export.static import read
from qmixlora.export.targets import make_targets

from .helpers import Q_PROJ, QUIET, TASKS, exported

KNOWN = ["PlotQA+visual_question_answering", "a/b", "a b", "c=1", ".."]


def shares(*tasks: str) -> list[tuple[str, dict[str, float]]]:
    return [(target.name, target.shares) for target in make_targets(Request(tasks=tasks), KNOWN)]


def test_every_task_is_a_target_of_its_own() -> None:
    assert shares("c=1", "a/b") == [("c_1", {"c=1": 1.0}), ("a_b-c14cddc0", {"a/b": 1.0})]


def test_a_weight_mixes_the_tasks_into_one_target() -> None:
    assert shares("c=1=3", "a/b") == [("a_b-c14cddc0=0.25+c_1=0.75", {"c=1": 0.75, "a/b": 0.25})]


@pytest.mark.parametrize(
    ("tasks", "words"),
    [
        (("d",), "no task 'd'"),
        (("a/b=x",), "'x' is no weight"),
        (("a/b=0",), "'0' is no weight"),
        (("a/b=inf",), "'inf' is no weight"),
    ],
)
def test_a_task_that_cannot_be_exported_is_named(tasks: tuple[str, ...], words: str) -> None:
    with pytest.raises(UserError, match=words):
        shares(*tasks)


def test_tasks_are_mixed_by_their_matrices(run: Path) -> None:
    export(run, Request(tasks=TASKS), QUIET)
    fidelity = exported(run, tasks=("color=0.9", "count=0.3"))
    assert fidelity.tasks == {"color": pytest.approx(0.75), "count": pytest.approx(0.25)} and fidelity.samples == 4
    one, two, both = (
        read(run / "exports" / f"{name}-lora").updates[Q_PROJ] for name in (*TASKS, "color=0.75+count=0.25")
    )
    torch.testing.assert_close(both.up_OK, 0.75 * one.up_OK + 0.25 * two.up_OK)
    assert torch.equal(both.down_KI, one.down_KI)


def test_all_tasks_together_are_one_export(run: Path) -> None:
    fidelity = exported(run, tasks=(), together=True)
    assert len(fidelity.tasks) == 10
    assert exported_tasks(run / "exports" / "all-lora") == list(fidelity.tasks)


def test_a_folder_that_is_no_export_has_no_exported_tasks(run: Path) -> None:
    assert exported_tasks(run) == []
    (run / "fidelity.json").write_text(json.dumps({"tasks": {"color": 1.0}}))
    assert exported_tasks(run) == ["color"]
