"""A run whose projector learned factors: its exports' base has them, or they are exported beside the mixture's mean."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForImageTextToText

from qmixlora.data import load_split
from qmixlora.export.static import Learned, StaticAdapter, learned_by, lora_session, read
from qmixlora.inspection.interference import measure_interference
from qmixlora.recipe import Edit
from qmixlora.session import open_collator, open_model, open_tuned_run
from qmixlora.training import train

from .helpers import MODEL_INPUTS, QUIET, dense, exported, name_on_the_hub, on_the_hub, recipe_of, rows_of

UNQUANTISED = {"quantization": "none"}
LINEAR_1 = "model.multi_modal_projector.linear_1"


@pytest.mark.parametrize("method", ["mixlora", pytest.param("lora", marks=pytest.mark.long)])
def test_its_factors_are_in_the_base_and_the_loras_are_of_the_language_model_alone(
    make_run: Callable[..., Path], backbone: Path, method: str
) -> None:
    """The base in stock transformers with the LoRA in stock PEFT is the run's model."""
    run = make_run(projector="lora", method=method)
    session = open_tuned_run(run)
    learned = learned_by(session.model, session.anatomy.projector_targets)
    assert [*learned.beside] == [LINEAR_1, LINEAR_1.replace("_1", "_2")] and not learned.modules
    assert dense(learned.beside[LINEAR_1]).abs().max() > 1e-3
    fidelity = exported(run)
    adapter = read(fidelity.folder)
    assert adapter.updates.keys() == learned.pools.keys() and not adapter.modules and not fidelity.notes
    assert fidelity.projector == "base"
    weight = name_on_the_hub(f"{LINEAR_1}.weight")
    before = on_the_hub(load_file(backbone / "model.safetensors"))[weight]
    base = load_file(run / "exports" / "base" / "model.safetensors")[weight]
    torch.testing.assert_close(base, before + dense(learned.beside[LINEAR_1]))
    stock = AutoModelForImageTextToText.from_pretrained(run / "exports" / "base", dtype=torch.float32)
    stock = PeftModel.from_pretrained(stock, str(fidelity.folder)).eval()
    whole = open_model(recipe_of(run).model_copy(update={"model": recipe_of(run).model.model_copy(update=UNQUANTISED)}))
    expected = lora_session(
        whole, learned.adapter(learned.identity()) if method == "lora" else adapter_of(adapter, learned)
    )
    inputs = open_collator(recipe_of(run))(list(rows_of(run, "color").select([0, 1])))
    inputs = {name: inputs[name] for name in MODEL_INPUTS}
    with torch.no_grad():
        computed, by_hand = stock(**inputs).logits, expected.model.eval()(**inputs).logits
    torch.testing.assert_close(computed, by_hand, atol=1e-4, rtol=0)


def adapter_of(adapter: StaticAdapter, learned: Learned) -> StaticAdapter:
    """An exported adapter with the projector's factors as factors."""
    return StaticAdapter({**adapter.updates, **learned.beside})


@pytest.mark.long
def test_its_factors_go_along_as_lora_where_they_are_asked_for_and_are_merged(make_run: Callable[..., Path]) -> None:
    run = make_run(projector="lora")
    learned = learned_by(open_tuned_run(run).model)
    assert exported(run, forms=("merged",)).merging.logits_difference < 1e-4  # as its adapter, or it would be refused
    fidelity = exported(run, projector="adapter")
    adapter = read(fidelity.folder)
    assert fidelity.projector == "low-rank" and "--enable-tower-connector-lora" in fidelity.notes[0]
    assert adapter.updates.keys() == {*learned.pools, *learned.beside} and not adapter.modules
    torch.testing.assert_close(dense(adapter.updates[LINEAR_1]), dense(learned.beside[LINEAR_1]))
    assert not json.loads((fidelity.folder / "adapter_config.json").read_text())["modules_to_save"]
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
