"""Polishing: further steps of a static adapter on its own task."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch

import qmixlora.export.adapters as adapters_module
from qmixlora.export.measurement import Measurement, measure
from qmixlora.export.polish import START, has_lost, is_better, polish
from qmixlora.export.static import StaticAdapter, learned_by, lora_session, read, taken_off
from qmixlora.recipe import Edit
from qmixlora.session import TunedSession, open_tuned_run

from .helpers import Q_PROJ, QUIET, exported, rows_of


@pytest.fixture
def mean(run: Path) -> StaticAdapter:
    exported(run)
    return read(run / "exports" / "color-lora")


@pytest.fixture
def session(run: Path, mean: StaticAdapter) -> TunedSession:
    """The mean on the run's backbone, its factors trainable."""
    live = open_tuned_run(run)
    return lora_session(live, mean, trained=learned_by(live.model).pools)


def test_polishing_learns_the_task(run: Path, mean: StaticAdapter, session: TunedSession) -> None:
    rows = rows_of(run, "color", "train")
    before = measure(session, rows).loss
    polish(session, mean, rows, 15, QUIET)
    assert measure(session, rows).loss < 0.7 * before


def test_polishing_touches_the_factors_alone(run: Path, mean: StaticAdapter, session: TunedSession) -> None:
    polish(session, mean, rows_of(run, "color", "train"), 2, QUIET)
    after = taken_off(session.model)
    assert not torch.equal(after.updates[Q_PROJ].up_OK, START * mean.updates[Q_PROJ].up_OK)
    for name, value in mean.modules.items():
        assert torch.equal(after.modules[name], value)


def test_polishing_starts_from_a_share_of_the_mean(run: Path, mean: StaticAdapter, session: TunedSession) -> None:
    at_rest = replace(session, recipe=Edit({"train.learning_rate": 1e-12}).apply(session.recipe))
    polish(at_rest, mean, rows_of(run, "color", "train"), 1, QUIET)
    for layer, update in taken_off(session.model).updates.items():
        torch.testing.assert_close(update.up_OK, START * mean.updates[layer].up_OK)
        torch.testing.assert_close(update.down_KI, mean.updates[layer].down_KI)


@pytest.mark.parametrize(("adapter", "start"), [({"method": "lora", "r": 4}, 1.0), ({}, START)])
def test_a_plain_lora_is_polished_from_all_of_its_update(
    make_run: Callable[..., Path], monkeypatch: pytest.MonkeyPatch, adapter: dict[str, object], start: float
) -> None:
    starts = []
    monkeypatch.setattr(adapters_module, "polish", lambda *arguments, start: starts.append(start))
    exported(make_run(**adapter), polish=1)
    assert starts == [start]


def measured(score: float, loss: float) -> Measurement:
    return Measurement(score, loss, [], {})


@pytest.mark.parametrize(
    ("score", "loss", "lost"),
    [(0.9, 1.0, False), (0.89, 1.04, False), (1.0, 0.5, False), (0.87, 1.0, True), (0.9, 1.06, True)],
)
def test_a_mean_has_lost_something_by_its_score_or_by_its_loss(score: float, loss: float, lost: bool) -> None:
    assert has_lost(measured(score, loss), measured(0.9, 1.0)) is lost


@pytest.mark.parametrize(
    ("score", "loss", "better"),
    [(0.91, 2.0, True), (0.89, 0.5, False), (0.9, 0.9, True), (0.9, 1.0, False), (0.9, 1.1, False)],
)
def test_an_adapter_is_better_by_its_score_then_by_its_loss(score: float, loss: float, better: bool) -> None:
    assert is_better(measured(score, loss), measured(0.9, 1.0)) is better
