"""What the report reads off a routing record, by hand."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from qmixlora.errors import UserError
from qmixlora.mixlora.routing_record import FILE, RoutingRecord
from qmixlora.report.routing import read_routing, routing_of
from tests.unit.report.records import record_by_hand


def test_entropy_is_0_for_one_factor_and_a_half_for_two_of_four(run: Path) -> None:
    assert read_routing(run).entropy()[0].tolist() == pytest.approx([0.0, 0.5])


def test_a_factor_without_gates_is_dead(run: Path) -> None:
    assert read_routing(run).dead()[0, 0].tolist() == [False, False, False, True]


def test_tasks_that_share_no_factor_are_not_alike(run: Path) -> None:
    torch.testing.assert_close(read_routing(run).similarity(), torch.eye(2))


def test_drift_is_the_share_of_gates_that_moved(run: Path) -> None:
    assert read_routing(run).drift().tolist() == pytest.approx([(0.75 + 0.5) / 2])


def test_the_summary_counts_dead_factors_and_names_steps(run: Path) -> None:
    summary = read_routing(run).to_dict()
    assert summary["dead_factors"] == {"A": 1, "B": 1, "of": 4}
    assert summary["drift"] == [{"step": 10, "moved": pytest.approx(0.625)}]


def test_figures_are_of_the_tasks_that_were_seen(run: Path, tmp_path: Path) -> None:
    """The usage of others in the record is even, and their mean zero."""
    of_two = read_routing(run).to_dict()
    record = record_by_hand(["s", "t", "u"])
    record.save(tmp_path / FILE)
    summary = read_routing(tmp_path)
    assert summary.unseen == ["u"]
    assert summary.to_dict() == of_two | {"unseen_tasks": ["u"]}
    assert record.entropy() == pytest.approx(0.25) == float(summary.entropy().mean())  # as trackers are told


def test_a_record_that_has_seen_nothing_is_none(tmp_path: Path) -> None:
    record = RoutingRecord(["s", "t"])
    record.add(1, {"model.layers.0.q": torch.zeros(2, 4, 4)}, torch.zeros(2))
    record.save(tmp_path / FILE)
    assert routing_of(tmp_path) is None


def test_a_run_without_a_record_says_so(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no record of its routing"):
        read_routing(tmp_path)


def test_a_record_without_a_snapshot_is_none(tmp_path: Path) -> None:
    RoutingRecord(["s", "t"]).save(tmp_path / FILE)
    assert routing_of(tmp_path) is None
    with pytest.raises(UserError, match="no record of its routing"):
        read_routing(tmp_path)
