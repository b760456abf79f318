"""What is said of a figure: good, watch or act, and what to do."""

from __future__ import annotations

from pathlib import Path

import pytest

from qmixlora.mixlora.routing_record import FILE
from qmixlora.report.readings import THRESHOLDS, lossy, read_export, read_interference, read_routing_figures
from qmixlora.report.routing import read_routing
from tests.unit.report.records import record_by_hand


def test_the_routing_of_a_run_is_read_in_three_sentences(run: Path) -> None:
    entropy, dead, similarity = read_routing_figures(read_routing(run))
    assert entropy.verdict == "watch" and "is 0.25: a task uses one factor or two" in entropy.text
    assert similarity.verdict == "good" and "0.00" in similarity.text
    assert dead.verdict == "watch" and "25%" in dead.text and "adapter.num_factors=3" in dead.text


def test_tasks_that_were_not_seen_are_named_and_hide_no_dead_factors(run: Path, tmp_path: Path) -> None:
    of_two = read_routing_figures(read_routing(run))
    record_by_hand(["s", "t", *(f"u{number}" for number in range(7))]).save(tmp_path / FILE)
    unseen, *others = read_routing_figures(read_routing(tmp_path))
    assert others == of_two
    assert unseen.verdict == "watch" and "7 of 9 tasks (u0, u1, u2, u3, u4 and 2 more)" in unseen.text


@pytest.mark.parametrize(
    ("value", "verdict"), [(-0.01, "good"), (-0.1, "watch"), (-0.4, "act"), (-9.0, "act"), (None, "watch")]
)
def test_interference_is_read_by_what_it_costs_on_average(value: float | None, verdict: str) -> None:
    reading = read_interference(["s", "t"], {"A": [[1.0, value], [None if value is None else 0.2, 1.0]]})
    assert reading.verdict == verdict
    if value == -9.0:
        assert "50.0%" in reading.text and "t for s" in reading.text


@pytest.mark.parametrize(
    ("error", "own", "verdict"), [(0.1, 0.9, "good"), (0.9, 0.9, "watch"), (0.1, 0.87, "watch"), (0.1, 0.5, "act")]
)
def test_an_export_is_read_by_its_score_before_its_update_error(error: float, own: float, verdict: str) -> None:
    assert read_export(error, 0.9, own).verdict == verdict


def test_an_export_of_a_run_that_knows_nothing_is_not_called_good() -> None:
    reading = read_export(0.0, 0.0, 0.0)
    assert reading.verdict == "act" and "nothing to lose" in reading.text
    (told,) = lossy([("a", reading), ("b", reading), ("good", read_export(0.0, 1.0, 1.0)), ("c", reading)])
    assert told.text == f"in a, b and c: {reading.text}"


def test_every_threshold_has_a_reason() -> None:
    assert all(len(threshold.reason) > 20 for threshold in THRESHOLDS.values())
