"""Experts in NF4 compute as their dequantised weights do, one at a time, and keep none of these."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import bitsandbytes as bnb
import pytest
import torch
from torch import Tensor, nn
from transformers import AutoModelForImageTextToText

from qmixlora.backbone import find_anatomy, load_backbone
from qmixlora.backbone.experts import NF4Experts, expert_parameters, nf4_experts
from qmixlora.errors import UserError
from qmixlora.recipe import Model
from tests.families.checkpoint import make_checkpoint
from tests.families.variant import variants

CPU = torch.device("cpu")
SIZES = pytest.mark.parametrize("size", [(4, 128, 64), (3, 64, 96), (5, 320, 64)], ids=str)  # a scale block lies across


def weights(size: tuple[int, ...]) -> Tensor:
    return torch.randn(size, generator=torch.Generator().manual_seed(0)) * torch.linspace(1, 9, size[0])[:, None, None]


def reference(weight: Tensor) -> Tensor:
    """As bitsandbytes itself quantises and dequantises the parameter."""
    row = weight.reshape(1, -1)  # rows that are not whole blocks are dequantised wrongly on a CPU
    packed, state = bnb.functional.quantize_4bit(row, blocksize=64, compress_statistics=True, quant_type="nf4")
    return bnb.functional.dequantize_4bit(packed, state).view(weight.shape)


@SIZES
def test_an_expert_is_its_part_of_the_dequantised_parameter(size: tuple[int, ...]) -> None:
    experts, whole = nf4_experts(weights(size), CPU), reference(weights(size))
    for index in range(size[0]):
        assert torch.equal(experts[torch.tensor(index)].value(), whole[index])
    assert torch.equal(experts.dequantised(None), whole)
    assert experts.shape == size and experts.weight.quant_state.nested


@pytest.mark.parametrize("product", [nn.functional.linear, lambda x, w: x @ w.value().T, torch.matmul])
def test_products_and_gradients_are_those_of_the_dequantised_weight(product: Any) -> None:
    experts, whole = nf4_experts(weights((4, 64, 64)), CPU), reference(weights((4, 64, 64)))
    x = torch.randn(7, 64, generator=torch.Generator().manual_seed(1))
    ours, theirs = x.clone().requires_grad_(), x.clone().requires_grad_()
    out = product(ours, experts[2])
    right = theirs @ whole[2] if product is torch.matmul else nn.functional.linear(theirs, whole[2])
    out.square().sum().backward()
    right.square().sum().backward()
    assert torch.equal(out, right) and torch.equal(ours.grad, theirs.grad)  # type: ignore[arg-type]


def test_products_keep_no_dequantised_weight_for_the_backward_pass() -> None:
    experts = nf4_experts(weights((4, 64, 64)), CPU)
    x = torch.randn(7, 64, requires_grad=True)
    saved: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: saved.append(tensor) or tensor, lambda tensor: tensor):
        nn.functional.linear(x, experts[1])
    assert not saved


def test_a_class_that_multiplies_with_all_experts_at_once_works() -> None:
    experts, whole = nf4_experts(weights((4, 64, 64)), CPU), reference(weights((4, 64, 64)))
    x = torch.randn(4, 3, 64, requires_grad=True)
    out = torch.bmm(x, experts)  # type: ignore[arg-type]
    assert torch.equal(out, torch.bmm(x, whole))
    out.sum().backward()
    assert x.grad is not None


def test_convolutions_and_odd_sizes_are_no_experts() -> None:
    module = nn.Module()
    module.conv = nn.Conv1d(64, 64, 3)
    module.experts, module.odd = nn.Parameter(torch.ones(4, 64, 64)), nn.Parameter(torch.ones(4, 5, 5))
    module.one = nn.Parameter(torch.ones(1, 64, 64))
    assert expert_parameters(module) == ["experts"]


@pytest.fixture(scope="module")
def mixture(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small Qwen3-VL with experts."""
    return make_checkpoint(variants()["qwen3_vl_moe"], tmp_path_factory.mktemp("mixture"))


@pytest.mark.parametrize("levers", [{}, {"stream_layers": 1, "quantize_lm_head": "nf4"}], ids=["plain", "levers"])
def test_a_model_computes_as_with_the_dequantised_experts(mixture: Path, levers: Any) -> None:
    held, _, anatomy = load_backbone(Model(id=str(mixture), dtype="float32", **levers))
    wide, _, _ = load_backbone(Model(id=str(mixture), dtype="float32", keep=["experts"], **levers))
    assert len(anatomy.experts) == 4
    for name in anatomy.experts:
        experts, parameter = held.get_submodule(name), wide.get_parameter(name)
        assert isinstance(experts, NF4Experts)
        assert torch.equal(experts.dequantised(None), reference(parameter.detach()))
        parameter.data.copy_(experts.dequantised(None))
    ids = torch.arange(12)[None]
    with torch.no_grad():
        assert torch.equal(held.eval()(input_ids=ids).logits, wide.eval()(input_ids=ids).logits)


def test_kept_layers_stay_in_16_bits_and_no_others(mixture: Path) -> None:
    model, _, anatomy = load_backbone(Model(id=str(mixture), dtype="bfloat16", keep=["layers.0.*", "o_proj"]))
    for path in anatomy.targets:
        wide = "layers.0." in path or path.endswith("o_proj")
        assert (model.get_submodule(path).weight.dtype == torch.bfloat16) == wide, path
    assert [".layers.0." in name for name in anatomy.experts] == [name in anatomy.wide for name in anatomy.experts]


def test_a_pattern_that_matches_nothing_is_refused_by_name(mixture: Path) -> None:
    with pytest.raises(UserError, match=r"No layer of the language model matches 'nonesuch'\.") as refused:
        load_backbone(Model(id=str(mixture), keep=["nonesuch"]))
    assert refused.value.where == "model.keep"


def test_layers_that_peft_rewrites_are_not_adapted(tmp_path: Path) -> None:
    folder = make_checkpoint(variants()["glm4v_moe"], tmp_path)
    anatomy = find_anatomy(AutoModelForImageTextToText.from_pretrained(folder))
    assert anatomy.unadapted and all(path.endswith(("gate_proj", "up_proj", "down_proj")) for path in anatomy.unadapted)
    assert {path.rpartition(".")[2] for path in anatomy.adaptable} == {"q_proj", "k_proj", "v_proj", "o_proj"}
