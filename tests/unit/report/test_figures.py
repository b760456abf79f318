"""Figures of a run: files that are images, and not blank ones."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from PIL import Image
from qmixlora.cli import inspect
from rich.console import Console

from qmixlora.mixlora.routing_record import FILE
from qmixlora.report.figures import draw_interference, draw_routing
from qmixlora.report.routing import read_routing
from tests.unit.report.records import NAMES, record_by_hand


def is_drawn(path: Path) -> bool:
    with Image.open(path) as image:
        return len(image.convert("RGB").getcolors(10**6) or ()) > 10


def test_the_routing_of_a_run_is_drawn(run: Path) -> None:
    figures = draw_routing(read_routing(run), run / "figures")
    assert [path.name for path in figures] == ["routing-usage.png", "routing-tasks.png", "routing-drift.png"]
    assert all(is_drawn(path) for path in figures)


@pytest.mark.parametrize("tasks", [("s", "t"), NAMES])
def test_interference_is_drawn(tmp_path: Path, tasks: tuple[str, ...]) -> None:
    size = len(tasks)
    matrices = {"A": torch.eye(size), "B": -torch.eye(size)}
    assert is_drawn(draw_interference(tasks, matrices, tmp_path / "figures" / "interference.png"))


def test_no_name_of_a_task_is_a_formula(tmp_path: Path) -> None:
    record_by_hand(NAMES).save(tmp_path / FILE)
    assert all(map(is_drawn, draw_routing(read_routing(tmp_path), tmp_path / "figures")))


def test_a_record_is_told_before_it_is_drawn(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (run / "figures").write_text("no folder")
    with pytest.raises(OSError):
        inspect._routing(run, Console(stderr=True), as_json=True)
    assert json.loads(capsys.readouterr().out)["layers"] == 1
