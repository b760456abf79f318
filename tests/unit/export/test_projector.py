"""A run whose projector learned factors: they are exported as they are, beside the mixture's mean."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from qmixlora.data import load_split
from qmixlora.export.static import learned_by, read
from qmixlora.inspection.interference import measure_interference
from qmixlora.recipe import Edit
from qmixlora.session import open_tuned_run
from qmixlora.training import train

from .helpers import QUIET, dense, exported, recipe_of

LINEAR_1 = "model.multi_modal_projector.linear_1"


def test_its_factors_are_exported_as_lora_and_merged(make_run: Callable[..., Path]) -> None:
    run = make_run(projector="lora")
    learned = learned_by(open_tuned_run(run).model)
    assert [*learned.beside] == [LINEAR_1, LINEAR_1.replace("_1", "_2")] and not learned.modules
    assert dense(learned.beside[LINEAR_1]).abs().max() > 1e-3
    fidelity = exported(run)
    adapter = read(fidelity.folder)
    assert not adapter.modules and not fidelity.notes
    assert adapter.updates.keys() == {*learned.pools, *learned.beside}
    torch.testing.assert_close(dense(adapter.updates[LINEAR_1]), dense(learned.beside[LINEAR_1]))
    assert not json.loads((fidelity.folder / "adapter_config.json").read_text())["modules_to_save"]
    assert exported(run, forms=("merged",)).merging.logits_difference < 1e-4  # as its adapter, or it would be refused
    cut = exported(run, projector="low-rank", projector_rank=1)
    assert "projector" not in cut.kept  # there is no whole module to cut


def test_routing_and_interference_are_of_the_mixture_alone(make_run: Callable[..., Path]) -> None:
    run = make_run(projector="lora")
    session = open_tuned_run(run)
    measured = measure_interference(session, load_split(recipe_of(run).data, "train"), batches=1, batch_size=2)
    assert {layer for layer, _ in measured.matrices} == {*session.anatomy.targets}


@pytest.mark.long
def test_a_resumed_run_learns_what_a_straight_one_learns(make_run: Callable[..., Path], tmp_path: Path) -> None:
    straight = make_run(projector="lora")
    short = Edit({"train.output": str(tmp_path / "short"), "train.max_steps": 5, "train.schedule": "constant"})
    recipe = short.apply(recipe_of(straight))
    train(recipe, console=QUIET)
    resumed = train(Edit({"train.max_steps": 7}).apply(recipe), resume=True, console=QUIET)
    whole = Edit({"train.max_steps": 7, "train.output": str(tmp_path / "whole")}).apply(recipe)
    one, other = (learned_by(open_tuned_run(folder).model) for folder in (resumed, train(whole, console=QUIET)))
    assert torch.equal(dense(one.beside[LINEAR_1]), dense(other.beside[LINEAR_1]))
    begun = Edit({"train.output": str(tmp_path / "begun"), "train.max_steps": 1}).apply(recipe)
    begun = train(begun, init_from=resumed, console=QUIET)
    change = dense(learned_by(open_tuned_run(begun).model).beside[LINEAR_1]) - dense(one.beside[LINEAR_1])
    assert change.abs().max() < 0.5 * dense(one.beside[LINEAR_1]).abs().max()  # it went on from there
