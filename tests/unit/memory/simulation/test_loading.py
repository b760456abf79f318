"""The peak of loading: what lies on the device and on the host, and what is on its way."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import bitsandbytes as bnb
import pytest
import torch

from qmixlora.backbone import load_backbone
from qmixlora.backbone.levers import host_tensors
from qmixlora.backbone.levers.streaming import ring_of
from qmixlora.memory.simulation.loading import LoadingPeak, loading_peak
from qmixlora.recipe import Model
from tests.backbones import save_llava
from tests.unit.backbone.levers.helpers import LEVERS, meta_model


@pytest.fixture(scope="module")
def deep(tmp_path_factory: pytest.TempPathFactory, processor: Any) -> Path:
    """A random LLaVA of five decoder layers."""
    return save_llava(tmp_path_factory.mktemp("deep"), processor, layers=5, width=64)


EVERY = pytest.mark.parametrize("levers", [{}, *LEVERS])


def spec_of(folder: Path, levers: dict[str, Any]) -> Model:
    return Model(id=str(folder), dtype="float32", **levers)


def peak(folder: Path, levers: dict[str, Any], stored: torch.dtype = torch.float32) -> LoadingPeak:
    """Planned without levers' tensors in memory; `stored` is the checkpoint's dtype."""
    return loading_peak(*meta_model(folder, levers), spec_of(folder, levers), stored)


@EVERY
def test_the_host_holds_what_levers_put_there_and_one_streamed_layer(levers: dict[str, Any], deep: Path) -> None:
    loaded, _, anatomy = load_backbone(spec_of(deep, levers))
    ring = ring_of(loaded.get_submodule(anatomy.language))
    layer = 0 if ring is None else len(ring.buffers[0])
    assert peak(deep, levers).host == sum(tensor.nbytes for tensor in host_tensors(loaded)) + layer


@EVERY
def test_the_device_holds_more_than_what_stays_there(levers: dict[str, Any], deep: Path) -> None:
    loaded, _, _ = load_backbone(spec_of(deep, levers))
    storages = {
        tensor.untyped_storage()._cdata: tensor.untyped_storage().nbytes()
        for tensor in (*loaded.parameters(), *loaded.buffers())
        if tensor.dtype in (torch.uint8, torch.int8) or levers == {}
    }
    assert peak(deep, levers).device > sum(storages.values())


@EVERY
def test_a_checkpoint_in_another_dtype_takes_more_of_the_host_alone(levers: dict[str, Any], deep: Path) -> None:
    same, other = peak(deep, levers), peak(deep, levers, torch.float16)
    assert other.host > same.host and other.device == same.device


def test_without_levers_all_that_stays_and_the_largest_weight_on_its_way(deep: Path) -> None:
    """In 32 bits, in 4 bits and its scales."""
    model, anatomy = meta_model(deep, {})
    weights = sum(p.nbytes for p in model.parameters()) + sum(b.nbytes for b in model.buffers())
    largest = max(model.get_submodule(path).weight.quant_state.shape.numel() for path in anatomy.targets)
    states = [m.weight.quant_state for m in model.modules() if isinstance(m, bnb.nn.Linear4bit)]
    scales = sum(s.absmax.nbytes + 16 * 4 + s.state2.absmax.nbytes + 256 * 4 for s in states)
    assert peak(deep, {}).device == weights + scales + int(largest * (4 + 0.5 + 1 / 16))


def test_an_offloaded_table_of_a_model_in_16_bits_is_on_the_device_first(deep: Path) -> None:
    offloaded = {"offload_embeddings": True}
    model, anatomy = meta_model(deep, offloaded)
    quantised = spec_of(deep, offloaded)
    whole = quantised.model_copy(update={"quantization": "none"})
    first, never = (loading_peak(model, anatomy, spec, torch.float32).device for spec in (whole, quantised))
    assert first - never == model.get_input_embeddings().weight.numel() * 4
