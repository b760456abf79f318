"""Long work shows how far it is and how long it will take: by a bar on a terminal, by a line elsewhere."""

from __future__ import annotations

import io
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from qmixlora import progress
from qmixlora.backbone import load_backbone
from qmixlora.recipe import Recipe


class Clock:
    """A clock that a test moves."""

    def __init__(self) -> None:
        self.now = 0.0

    def monotonic(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(progress, "time", clock)
    return clock


def shown(clock: Clock, times: list[float], *, terminal: bool) -> str:
    """What is shown of work of so many parts, each of which is told at its time."""
    console = Console(file=io.StringIO(), force_terminal=terminal, width=100, color_system=None)
    with progress.progress("weighing", console) as tell:
        for done, now in enumerate(times, start=1):
            clock.now = now
            tell(done, len(times))
    file = console.file
    assert isinstance(file, io.StringIO)
    return file.getvalue()


def test_a_terminal_shows_a_bar_with_the_time_left(clock: Clock) -> None:
    text = shown(clock, [0.5, 1.5, 2, 3], terminal=True)
    assert "weighing" in text and "4/4" in text and "left" in text and "1/4" not in text


@pytest.mark.parametrize("terminal", [False, True])
def test_what_lasts_a_moment_shows_nothing(clock: Clock, terminal: bool) -> None:
    assert shown(clock, [0.1, 0.2, 0.9], terminal=terminal) == ""


def test_a_pipe_gets_a_line_now_and_then_and_no_other(clock: Clock) -> None:
    text = shown(clock, [10, 31, 40, 62, 70, 80, 90, 140], terminal=False)
    assert text.splitlines() == [
        "  weighing: 25%, about 93 s left",
        "  weighing: 50%, about 62 s left",
    ]


def test_only_the_first_process_of_several_shows_it(clock: Clock, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(progress, "local_rank", lambda: 1)
    assert shown(clock, [40, 80], terminal=False) == ""


@pytest.fixture
def every_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(progress, "SELDOM", 0.0)


@pytest.mark.usefixtures("every_line")
def test_reading_a_file_tells_the_bytes_that_were_read(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "rows").write_bytes(b"row\n" * 10_000)
    with progress.reading(tmp_path / "rows") as file:
        assert sum(1 for _ in file) == 10_000
    lines = capsys.readouterr().err.splitlines()
    assert [line.split(",")[0] for line in lines] == [f"  reading rows: {share}%" for share in (20, 41, 61, 82)]


@pytest.mark.usefixtures("every_line")
def test_loading_a_backbone_counts_its_weights(
    make_recipe: Callable[..., Recipe], capsys: pytest.CaptureFixture[Any]
) -> None:
    load_backbone(make_recipe().model)
    lines = [line for line in capsys.readouterr().err.splitlines() if "loading backbone" in line]
    assert len(lines) > 10 and "about" in lines[0]
