"""Figures of a run: files that are images, and not blank ones."""

from __future__ import annotations

from pathlib import Path

import torch
from PIL import Image

from qmixlora.report.figures import draw_interference, draw_routing
from qmixlora.report.routing import read_routing


def is_drawn(path: Path) -> bool:
    with Image.open(path) as image:
        return len(image.convert("RGB").getcolors(10**6) or ()) > 10


def test_the_routing_of_a_run_is_drawn(run: Path) -> None:
    figures = draw_routing(read_routing(run), run / "figures")
    assert [path.name for path in figures] == ["routing-usage.png", "routing-tasks.png", "routing-drift.png"]
    assert all(is_drawn(path) for path in figures)


def test_interference_is_drawn(tmp_path: Path) -> None:
    matrices = {"A": torch.eye(2), "B": -torch.eye(2)}
    assert is_drawn(draw_interference(["s", "t"], matrices, tmp_path / "figures" / "interference.png"))
