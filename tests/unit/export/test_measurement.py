"""Measurements of a model on some rows, against dense matrices."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from qmixlora.export.measurement import Measurement, measure, measure_updates
from qmixlora.export.static import learned_by
from qmixlora.recipe import Edit
from qmixlora.session import open_tuned_run
from tests.unit.mixlora.conversations import mixed_rows

from .helpers import Q_PROJ, dense, rows_of


def test_the_update_error_is_that_of_dense_matrices(run: Path) -> None:
    session = open_tuned_run(run)
    learned, rows = learned_by(session.model), rows_of(run, "color")
    updates = measure_updates(session, learned, rows)
    torch.manual_seed(0)
    adapter = learned.adapter(torch.rand(14, 4, 4))
    pools, own = learned.pools[Q_PROJ], []
    for row in rows:
        session.model(**session.on_device(session.collator([row])))
        mix_EF = session.model.base_model.last_selection()[list(learned.pools).index(Q_PROJ), 0]
        own.append(learned.scaling * pools[1].T @ mix_EF.T @ pools[0])
    target = dense(adapter.updates[Q_PROJ])
    error = sum((d - target).square().sum() for d in own) / sum(d.square().sum() for d in own)
    assert updates.errors(learned, adapter)[Q_PROJ] == pytest.approx(float(error), rel=1e-4)


def test_updates_are_those_of_segments(run: Path) -> None:
    session = open_tuned_run(run)
    learned, rows = learned_by(session.model), mixed_rows(session.recipe)
    updates = measure_updates(session, learned, rows)
    squares: list[float] = []
    for row in rows:
        session.model(**session.collator([row]))
        for mix_EF in session.model.base_model.last_selection()[list(learned.pools).index(Q_PROJ)]:
            up, down = learned.pools[Q_PROJ][1], learned.pools[Q_PROJ][0]
            squares.append(float((learned.scaling * up.T @ mix_EF.T @ down).square().sum()))
    assert len(squares) == 6
    assert updates.squares[Q_PROJ] == pytest.approx(sum(squares) / 6, rel=1e-4)


def test_the_loss_does_not_depend_on_the_batches(run: Path) -> None:
    session, rows = open_tuned_run(run), rows_of(run, "where", "train")
    losses = []
    for size in (1, 4, 6):
        recipe = Edit({"train.eval_batch_size": size}).apply(session.recipe)
        losses.append(measure(replace(session, recipe=recipe), rows).loss)
    assert losses == pytest.approx([losses[0]] * 3, rel=1e-4)


def test_a_score_names_the_metrics_that_it_is_by(run: Path) -> None:
    session, rows = open_tuned_run(run), rows_of(run, "color")
    recipe = Edit({"data.metrics": {"*": "anls"}}).apply(session.recipe)
    assert measure(session, rows).metrics == {"color": "exact"}
    assert measure(replace(session, recipe=recipe), rows).metrics == {"color": "anls"}


def test_agreement_is_the_share_of_rows_with_the_same_words() -> None:
    one, other = (Measurement(0.0, 0.0, answers, {}) for answers in (["a", "b", "c", "d"], ["a", "B", "c", ""]))
    assert one.agreement(other) == 0.5
