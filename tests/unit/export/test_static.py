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

PROJECTOR = "model.multi_modal_projector"
LINEAR_1 = f"{PROJECTOR}.linear_1"


def exported_adapter(run: Path) -> StaticAdapter:
    return read(run / "exports" / "color-lora")


def test_every_update_is_that_of_the_recorded_mean(run: Path) -> None:
    exported(run, projector="adapter")
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
    lora_A.weight and lora_B.weight on linear layers of the language model, of one rank and one alpha.
    """
    exported(run)
    folder = run / "exports" / "color-lora"
    config = json.loads((folder / "adapter_config.json").read_text())
    assert not config["modules_to_save"] and config["lora_alpha"] == config["r"] == 4
    assert not config["rank_pattern"] and not config["alpha_pattern"]
    keys = set(load_file(folder / "adapter_model.safetensors"))
    assert len(keys) == 2 * 14 and all(key.startswith("base_model.model.model.language_model.layers.") for key in keys)
    assert all(key.endswith((".lora_A.weight", ".lora_B.weight")) for key in keys)


@pytest.mark.parametrize("rank", [3, 8])
def test_rank_and_alpha_are_the_language_models_whatever_the_projector_has(run: Path, rank: int) -> None:
    """llama.cpp knows one alpha, and divides it by each tensor's own rank."""
    fidelity = exported(run, projector="low-rank", projector_rank=rank)
    config = json.loads((run / "exports" / "color-lora" / "adapter_config.json").read_text())
    assert config["r"] == config["lora_alpha"] == fidelity.rank == 4
    assert config["rank_pattern"] == config["alpha_pattern"] == {f"{PROJECTOR}.linear_{n}": rank for n in (1, 2)}
    language = {layer: u.rank for layer, u in exported_adapter(run).updates.items() if PROJECTOR not in layer}
    assert set(language.values()) == {4} and len(language) == 14


def test_what_servers_make_of_a_projector_in_the_adapter_is_noted(run: Path) -> None:
    assert exported(run).notes == ()
    (whole,) = exported(run, projector="adapter").notes
    assert "vLLM refuses" in whole and "--projector base" in whole
    (low_rank,) = exported(run, projector="low-rank").notes
    assert "--enable-tower-connector-lora" in low_rank and "linear_1 linear_2" in low_rank


def test_the_projector_as_low_rank_is_the_best_of_its_rank_and_says_what_it_keeps(run: Path) -> None:
    kept = exported(run, projector="low-rank", projector_rank=2).kept["projector"].layers
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
