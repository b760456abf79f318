"""Layers that read the same input share dropout, cast and product, and compute what each would alone."""

from __future__ import annotations

import copy
import weakref

import pytest
import torch
from peft import get_peft_model
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

from qmixlora.memory.architectures import config_of
from qmixlora.memory.simulation.account import Account
from qmixlora.memory.simulation.batch import synthetic_batch
from qmixlora.memory.simulation.depth import at_depth
from qmixlora.memory.simulation.simulation import on_meta, simulated
from qmixlora.memory.simulation.skeleton import meta_backbone
from qmixlora.memory.simulation.step import adapted_on_meta
from qmixlora.memory.simulation.work import training_step
from qmixlora.mixlora import MixLoraConfig
from qmixlora.recipe import Recipe, edited, validate

from .reference import update

R, ALPHA = 2, 5.0
NAMES = ("q_proj", "k_proj", "v_proj", "o_proj")


class Attention(nn.Module):
    """The projections of an attention, of which k and v may read another input."""

    def __init__(self, crossed: bool = False) -> None:
        super().__init__()
        self.q_proj, self.k_proj, self.v_proj, self.o_proj = (nn.Linear(6, 6, bias=False) for _ in NAMES)
        self.crossed = crossed

    def forward(self, x: Tensor) -> Tensor:
        other = x.flip(1) if self.crossed else x
        return self.o_proj(self.q_proj(x) * self.k_proj(other) + self.v_proj(other))


class Decoder(nn.Module):
    def __init__(self, crossed: bool = False, recomputed: bool = False) -> None:
        super().__init__()
        self.attention, self.recomputed = Attention(crossed), recomputed

    def forward(self, x: Tensor) -> Tensor:
        inside = x * 1.0  # that nothing else holds
        if self.recomputed:
            return checkpoint(self.attention, inside, use_reentrant=False)
        return self.attention(inside)


def adapted(dropout: float = 0.0, crossed: bool = False, recomputed: bool = False) -> nn.Module:
    torch.manual_seed(4)
    config = MixLoraConfig(
        num_factors=5, r=R, alpha=ALPHA, dropout=dropout, route_on="all", condition_norm="none", target_modules=[*NAMES]
    )
    model = get_peft_model(Decoder(crossed, recomputed), config)
    for name, parameter in model.named_parameters():
        if "mixlora_" in name:
            nn.init.normal_(parameter)
    return model.train()


def reference_of(attention: nn.Module, x_BSI: Tensor, crossed: bool) -> Tensor:
    """The same, one layer and one sample at a time."""

    def layer(name: str, x: Tensor) -> Tensor:
        own = attention.get_submodule(name)
        parameters = {key: getattr(own, key)["default"] for key in ("mixlora_A", "mixlora_B", "mixlora_route_A")}
        rows = [
            own.base_layer(x_SI)
            + update(x_SI, x_SI.detach().mean(0), parameters, r=R, alpha=ALPHA, pairing="tied", kind="weighted")
            for x_SI in x
        ]
        return torch.stack(rows)

    other = x_BSI.flip(1) if crossed else x_BSI
    return layer("o_proj", layer("q_proj", x_BSI) * layer("k_proj", other) + layer("v_proj", other))


@pytest.mark.parametrize("recomputed", [False, True])
@pytest.mark.parametrize("crossed", [False, True])
def test_siblings_equal_the_reference_whatever_they_read(crossed: bool, recomputed: bool) -> None:
    model, x_BSI = adapted(crossed=crossed, recomputed=recomputed), torch.randn(3, 4, 6)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    model(x_BSI).square().sum().backward()
    expected = reference_of(model.base_model.model.attention, x_BSI, crossed).square().sum()
    for parameter, gradient in zip(trained, torch.autograd.grad(expected, trained), strict=True):
        assert parameter.grad is not None
        torch.testing.assert_close(parameter.grad, gradient, rtol=1e-4, atol=1e-5 * float(gradient.abs().max()))


def test_siblings_drop_the_same_features() -> None:
    """With one pool for all of them, what differs between q and v is nothing but the base layers."""
    model = adapted(dropout=0.5)
    attention = model.base_model.model.attention
    for name in NAMES[1:]:
        own = attention.get_submodule(name)
        for key in ("mixlora_A", "mixlora_B", "mixlora_route_A"):
            getattr(own, key)["default"] = getattr(attention.q_proj, key)["default"]
    x_BSI = torch.randn(2, 4, 6)
    q, v, o = (
        layer(x_BSI) - layer.base_layer(x_BSI) for layer in (attention.q_proj, attention.v_proj, attention.o_proj)
    )
    torch.testing.assert_close(q, v)
    assert not torch.allclose(q, o)


def test_nothing_of_an_input_is_kept_when_its_layers_have_read_it() -> None:
    model, inputs = adapted(dropout=0.5), []
    model.base_model.model.attention.register_forward_pre_hook(lambda _, args: inputs.append(weakref.ref(args[0])))
    with torch.no_grad():
        model(torch.randn(2, 4, 6))
    assert inputs[0]() is None


def test_a_copied_model_has_siblings_of_its_own() -> None:
    model = adapted()
    layer = copy.deepcopy(model).base_model.model.attention.k_proj
    assert layer in layer.mixlora_siblings
    assert model.base_model.model.attention.k_proj not in layer.mixlora_siblings


class Counted(TorchDispatchMode):
    """Counts operations, but for those that return views of what they are given."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        views = [out.alias_info for out in func._schema.returns if out.alias_info is not None]
        self.count += not any(not alias.is_write for alias in views)
        return func(*args, **(kwargs or {}))


def operations_of(recipe: Recipe, layers: int) -> int:
    """The operations of a step (forward, recomputation, backward) with some decoder layers, without storage."""
    config = at_depth(config_of(recipe.model), layers)
    model = adapted_on_meta(recipe, *meta_backbone(config, recipe.model))
    inputs, account = synthetic_batch(config, recipe, 1024).inputs, Account()
    with simulated([], account), Counted() as counted:
        training_step(model, recipe, on_meta(inputs), account)
    return counted.count


def test_a_layer_makes_fewer_operations_than_with_lora() -> None:
    """LLaVA-1.5-7B, one sample at a time, dropout on: the difference of two depths."""
    values = {"model": {"id": "llava-hf/llava-1.5-7b-hf"}, "data": {"train": "-"}}
    mixture = validate(values, "test")
    lora = edited(mixture, ["adapter.method=lora"])
    assert mixture.adapter.dropout > 0
    conditional = edited(mixture, ["adapter.pairing=conditional"])
    ours, theirs, papers = (
        operations_of(recipe, 3) - operations_of(recipe, 2) for recipe in (mixture, lora, conditional)
    )
    assert ours <= 310 < 330 < theirs
    assert papers <= 390  # selected for all layers before the first, though each has a router of its own for that
