"""Streamed layers: their bytes are in place whenever they compute, and go back as they were quantised."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from qmixlora.backbone import check_quantized, load_backbone, nf4_linear
from qmixlora.backbone.levers import host_tensors
from qmixlora.backbone.levers.streaming import Copies, Ring, _fill, _powers_of_two
from qmixlora.backbone.quantizer import _to_host
from qmixlora.recipe import Model, Recipe

from .helpers import ALL, CPU, assert_same_step


@pytest.mark.parametrize(
    "adapter", [{}, {"target_modules": ["q_proj"]}, {"method": "lora", "target_modules": ["v_proj"]}]
)
def test_copies_that_take_long_are_waited_for(
    adapter: dict[str, Any], recipe_of: Callable[..., Recipe], monkeypatch: pytest.MonkeyPatch
) -> None:
    """On a GPU, bytes may be there no sooner than they are waited for; here they never are. Where down_proj has no
    adapter, nothing that it saved makes checkpointing compute its layer before its own gradient.
    """
    plain = recipe_of({}, adapter=adapter)
    under_way: dict[tuple[int, int], tuple[Tensor, list[Tensor]]] = {}

    def start(copies: Copies, buffer: Tensor, host: list[Tensor], key: int) -> None:
        buffer.fill_(7)
        under_way[id(copies), key] = buffer, host

    def wait(copies: Copies, key: int) -> None:
        if (id(copies), key) in under_way:
            _fill(*under_way.pop((id(copies), key)))

    monkeypatch.setattr(Copies, "start", start)
    monkeypatch.setattr(Copies, "wait", wait)
    assert_same_step(plain, recipe_of({"stream_layers": 5}, adapter=adapter))
    assert not under_way, "the last to be used is the first again"


def test_streaming_is_right_without_checkpointing_too(recipe_of: Callable[..., Recipe]) -> None:
    assert_same_step(recipe_of({}), recipe_of({"stream_layers": 4}), checkpointing=False)


def test_layers_of_different_sizes_share_buffers_of_the_largest() -> None:
    torch.manual_seed(0)
    sizes = [64, 192, 128, 320]

    def layers() -> list[nn.Module]:
        torch.manual_seed(1)
        return [nf4_linear(torch.randn(size, 64), None, CPU) for size in sizes]

    kept, streamed = layers(), layers()
    ring = Ring([[layer] for layer in streamed], CPU)  # type: ignore[list-item]
    for index, layer in enumerate(streamed):
        ring.watch(layer, index)
    assert {len(buffer) for buffer in ring.buffers} == {320 * 32}
    x = torch.randn(3, 64)
    for index in (0, 1, 2, 3, 2, 1, 0, 0, 3, 1):
        assert torch.equal(streamed[index](x), kept[index](x)), index


def test_the_next_layer_is_on_its_way_in_either_direction(deep: Path) -> None:
    model, _, anatomy = load_backbone(Model(id=str(deep), dtype="float32", stream_layers=4))
    ring: Ring = model.get_submodule(anatomy.language).streaming
    for layer, held in ((0, {0, 1}), (1, {1, 2}), (2, {2, 3}), (3, {2, 3}), (2, {1, 2}), (1, {0, 1}), (0, {0, 1})):
        ring.need(layer)
        assert set(ring.held) == held
    ring.need(3)
    ring.need(0)  # generation starts again
    assert set(ring.held) == {0, 1}


def test_streamed_layers_take_turns_in_two_buffers(deep: Path) -> None:
    model, _, anatomy = load_backbone(Model(id=str(deep), dtype="float32", stream_layers=4))
    layers = list(anatomy.layers.values())
    storages = [{model.get_submodule(path).weight.untyped_storage()._cdata for path in layer} for layer in layers]
    assert [len(own) for own in storages] == [1, 1, 1, 1, 7], "the last of five layers is not streamed"
    assert storages[0] == storages[2] != storages[1] == storages[3]


def test_streamed_layers_lie_in_host_memory_and_pass_for_quantised(deep: Path) -> None:
    model, _, anatomy = load_backbone(Model(id=str(deep), dtype="float32", stream_layers=4))
    check_quantized(model, anatomy)
    assert len(host_tensors(model)) == 4


def test_host_memory_is_taken_in_powers_of_two() -> None:
    assert _powers_of_two(101 * 2**20) == [size * 2**20 for size in (64, 32, 4, 1)]
    assert _powers_of_two(3) == [2**20]


def test_streamed_weights_go_back_as_they_are_quantised(deep: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    gone_back: list[Tensor] = []

    def to_host(packed: Tensor) -> Tensor:
        gone_back.append(packed)
        return _to_host(packed)

    monkeypatch.setattr("qmixlora.backbone.quantizer._to_host", to_host)
    load_backbone(Model(id=str(deep), dtype="float32", stream_layers=3))
    assert len(gone_back) == 3 * 7 and {packed.dtype for packed in gone_back} == {torch.uint8}


@pytest.mark.parametrize("levers", [{}, ALL])
def test_others_are_told_that_bitsandbytes_quantised_the_model(levers: dict[str, Any], deep: Path) -> None:
    """Trainer and PEFT ask for it."""
    model, _, _ = load_backbone(Model(id=str(deep), dtype="float32", **levers))
    assert str(model.quantization_method) == "QuantizationMethod.BITS_AND_BYTES"
    assert type(model.config.quantization_config).__name__ == "BitsAndBytesConfig"
    assert model.is_quantized and model.is_loaded_in_4bit and model.hf_quantizer.is_trainable


def test_levers_do_not_show_in_the_models_quantisation(deep: Path) -> None:
    plain, placed = (load_backbone(Model(id=str(deep), dtype="float32", **levers))[0] for levers in ({}, ALL))
    assert plain.config.quantization_config.to_dict() == placed.config.quantization_config.to_dict()
