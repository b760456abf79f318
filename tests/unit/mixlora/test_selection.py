"""Selections: computed once where layers share them, and never an I x O matrix."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from peft import get_peft_model
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from qmixlora.loss import supervised_loss
from qmixlora.mixlora import MixLoraConfig, MixLoraLayer
from qmixlora.mixlora import routing as routing_module
from qmixlora.mixlora.selection import mean_over, select
from qmixlora.recipe import Recipe

from .helpers import open_with


def test_layers_that_read_the_same_input_share_its_mean(
    make_recipe: Callable[..., Recipe], monkeypatch: pytest.MonkeyPatch
) -> None:
    session, batch = open_with(make_recipe, route_on="instruction")
    calls: list[int] = []

    def counted(x: Tensor, mask: Tensor | None) -> Tensor:
        calls.append(1)
        return mean_over(x, mask)

    monkeypatch.setattr(routing_module, "mean_over", counted)
    supervised_loss(session.model, batch)
    assert len(calls) == 2 * 4  # of each decoder layer: q, k and v; o; gate and up; down


@pytest.mark.parametrize("router", ["layer", "block", "model"])
@pytest.mark.parametrize("route_on", ["embedding", "task"])
def test_selections_made_ahead_are_those_of_each_layers_router(
    make_recipe: Callable[..., Recipe], route_on: str, router: str
) -> None:
    session, batch = open_with(make_recipe, route_on=route_on, gate="straight_through", router=router)
    session.model.eval()
    supervised_loss(session.model, batch)
    tuner = session.model.base_model
    condition_BD = tuner.mixlora_routing.current.cache.conditions["default"]
    layers = [m for m in session.model.modules() if isinstance(m, MixLoraLayer)]
    assert len(tuner.mixlora_routing.current.cache.selected) == len(layers) == 14
    every = {"layer": 1, "block": 7, "model": 14}[router]  # layers that share a router; the first has it
    assert [index for index, layer in enumerate(layers) if "default" in layer.mixlora_route_A] == [*range(0, 14, every)]
    for index, layer in enumerate(layers):
        first = layers[index // every * every]
        expected = select(layer.mixlora_config["default"], condition_BD @ first.mixlora_route_A["default"].T)
        torch.testing.assert_close(tuner.mixlora_routing.current.cache.mixing_matrices[layer, "default"], expected)


class Sizes(TorchDispatchMode):
    """The numbers of elements of all new tensors."""

    def __init__(self, weight: Tensor) -> None:
        super().__init__()
        self.weight, self.made = weight, list[int]()

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = function(*args, **(kwargs or {}))
        tensors = [t for t in (result if isinstance(result, (tuple, list)) else [result]) if isinstance(t, Tensor)]
        self.made += [t.numel() for t in tensors if t.data_ptr() != self.weight.data_ptr()]
        return result


@pytest.mark.parametrize("gate", ["weighted", "dense", "hard"])
@pytest.mark.parametrize("pairing", ["tied", "conditional"])
def test_no_matrix_of_the_layers_size_is_made(pairing: str, gate: str) -> None:
    width, out = 64, 96

    class OneLayer(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(width, out, bias=False)

        def forward(self, x: Tensor) -> Tensor:
            return self.linear(x)

    config = MixLoraConfig(
        num_factors=4, r=2, pairing=pairing, gate=gate, route_on="all", dropout=0.1, target_modules=["linear"]
    )
    model = get_peft_model(OneLayer(), config).train()
    x_BSI = torch.randn(3, 5, width, requires_grad=True)
    with Sizes(model.base_model.model.linear.base_layer.weight) as sizes:
        model(x_BSI).square().sum().backward()
    assert len(sizes.made) > 10 and max(sizes.made) < width * out


def test_to_choose_all_factors_is_to_weigh_them() -> None:
    """The default, which earlier releases called a dense gate."""
    logits_BE = torch.randn(3, 6)
    chosen, weighed = (MixLoraConfig(num_factors=6, r=6, gate=gate) for gate in ("weighted", "dense"))
    torch.testing.assert_close(select(chosen, logits_BE), select(weighed, logits_BE))
