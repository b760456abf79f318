"""A run as an ordinary adapter: its tensors against the equations, and what cuts keep of them."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

from qmixlora.export.static import StaticAdapter, learned_by, read
from qmixlora.session import open_tuned_run

from .helpers import Q_PROJ, dense, exported

LINEAR_1 = "model.multi_modal_projector.linear_1"


def exported_adapter(run: Path) -> StaticAdapter:
    return read(run / "exports" / "color-lora")


def test_every_update_is_that_of_the_recorded_mean(run: Path) -> None:
    exported(run)
    session = open_tuned_run(run)
    pools, scaling = learned_by(session.model).pools, session.model.peft_config["default"].scaling
    with safe_open(run / "routing.safetensors", "pt") as file:
        index = json.loads(file.metadata()["tasks"]).index("color")
        means = {layer: file.get_tensor(f"{layer}.mean")[index] for layer in pools}
    adapter = exported_adapter(run)
    assert adapter.updates.keys() == pools.keys() and len(adapter.modules) == 4
    for layer, update in adapter.updates.items():
        oracle = scaling * pools[layer][1].T @ means[layer].T @ pools[layer][0]  # s B^T C^T A
        torch.testing.assert_close(dense(update), oracle, atol=1e-5, rtol=0)


def test_keys_are_those_that_servers_expect(run: Path) -> None:
    """vLLM strips `base_model.model.`, maps `model.language_model.` to `language_model.model.` and wants the rest to be
    lora_A.weight and lora_B.weight on linear layers, with no module saved whole.
    """
    exported(run, projector_rank=3)
    folder = run / "exports" / "color-lora"
    config = json.loads((folder / "adapter_config.json").read_text())
    assert not config["modules_to_save"] and config["lora_alpha"] == config["r"] == 4
    keys = set(load_file(folder / "adapter_model.safetensors"))
    language = {key for key in keys if key.startswith("base_model.model.model.language_model.layers.")}
    projector = {key for key in keys if key.startswith("base_model.model.model.multi_modal_projector.linear_")}
    assert language | projector == keys and len(language) == 2 * 14 and len(projector) == 2 * 2
    assert all(key.endswith((".lora_A.weight", ".lora_B.weight")) for key in keys)


def test_a_whole_projector_is_noted_with_the_way_out(run: Path) -> None:
    assert any("--projector-rank" in note for note in exported(run).notes)
    assert exported(run, projector_rank=2).notes == ()


def test_the_projector_as_low_rank_is_the_best_of_its_rank_and_says_what_it_keeps(run: Path) -> None:
    kept = exported(run, projector_rank=2).kept["projector"].layers
    learned = learned_by(open_tuned_run(run).model)
    weight, bias = f"{LINEAR_1}.weight", f"{LINEAR_1}.bias"
    left, values, right = torch.linalg.svd(learned.modules[weight] - learned.originals[weight])
    best = (left[:, :2] * values[:2]) @ right[:2]
    torch.testing.assert_close(dense(exported_adapter(run).updates[LINEAR_1]), best, atol=1e-4, rtol=0)
    assert kept[weight] == pytest.approx(float(values[:2].square().sum() / values.square().sum()), rel=1e-3)
    assert 0 < kept[weight] < 1 and kept[bias] == 0.0


def test_an_export_at_full_rank_cuts_nothing(run: Path) -> None:
    fidelity = exported(run)
    assert fidelity.rank == 4 and fidelity.kept == {}


def test_a_smaller_rank_is_the_best_of_its_rank_and_says_what_it_keeps(run: Path) -> None:
    exported(run)
    full = dense(exported_adapter(run).updates[Q_PROJ])
    fidelity = exported(run, rank=2)
    assert fidelity.rank == 2
    left, values, right = torch.linalg.svd(full)
    share = float(values[:2].square().sum() / values.square().sum())
    assert fidelity.kept["rank"].layers[Q_PROJ] == pytest.approx(share, rel=1e-4)
    best = (left[:, :2] * values[:2]) @ right[:2]
    torch.testing.assert_close(dense(exported_adapter(run).updates[Q_PROJ]), best, atol=1e-4, rtol=0)
