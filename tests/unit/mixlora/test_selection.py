"""Conditions and selections: centred, computed once where layers share them, and never an I x O matrix."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import get_peft_model
from rich.console import Console
from torch import Tensor, nn
from torch.nn.functional import layer_norm
from torch.utils._python_dispatch import TorchDispatchMode

from qmixlora.data import load_conversations
from qmixlora.loss import supervised_loss
from qmixlora.mixlora import MixLoraConfig, MixLoraLayer
from qmixlora.mixlora import routing as routing_module
from qmixlora.mixlora.running_means import WINDOW, Center
from qmixlora.mixlora.selection import mean_over, select
from qmixlora.recipe import Recipe
from qmixlora.session import Session, open_session
from qmixlora.training import make_trainer
from qmixlora.training.callbacks import ProgressDisplay


def open_with(
    make_recipe: Callable[..., Recipe], train: dict[str, Any] | None = None, **adapter: Any
) -> tuple[Session, dict[str, Any]]:
    session = open_session(make_recipe(adapter=adapter, train=train or {}), ["color", "digit"])
    torch.manual_seed(3)
    for name, parameter in session.model.named_parameters():
        if "mixlora_" in name:
            torch.nn.init.normal_(parameter, std=0.3)
    rows = load_conversations(session.recipe.data.train)
    return session, session.collator([rows[i] for i in range(4)])


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


@pytest.mark.parametrize("pairing", ["tied", "independent"])
@pytest.mark.parametrize("route_on", ["embedding", "task"])
def test_selections_made_ahead_are_those_of_each_layer(
    make_recipe: Callable[..., Recipe], route_on: str, pairing: str
) -> None:
    session, batch = open_with(make_recipe, route_on=route_on, pairing=pairing, gate="straight_through")
    session.model.eval()
    supervised_loss(session.model, batch)
    tuner = session.model.base_model
    condition_BD = tuner.mixlora_routing.current.conditions["default"]
    layers = [m for m in session.model.modules() if isinstance(m, MixLoraLayer)]
    assert len(tuner.mixlora_routing.current.selected) == len(layers) == 14
    for layer in layers:
        route_A, route_B = (layer.mixlora_route_A["default"], layer.mixlora_route_B.get("default"))
        logits_B = None if route_B is None else condition_BD @ route_B.T
        expected = select(layer.mixlora_config["default"], condition_BD @ route_A.T, logits_B)
        torch.testing.assert_close(tuner.mixlora_routing.current.mixes[layer, "default"], expected)


@pytest.mark.parametrize("route_on", ["embedding", "instruction"])
def test_centred_conditions(make_recipe: Callable[..., Recipe], route_on: str) -> None:
    session, batch = open_with(make_recipe, route_on=route_on, condition_norm="center")
    center = next(m for m in session.model.modules() if isinstance(m, Center))
    seen: list[Tensor] = []
    center.register_forward_hook(lambda module, args, output: seen.append((args[0].detach(), output.detach())))
    session.model.train()
    supervised_loss(session.model, batch)
    normed = layer_norm(seen[0][0], seen[0][0].shape[-1:])
    torch.testing.assert_close(seen[0][1], normed)  # nothing known before the first batch
    assert center.count.item() == 0 and center.pending_count.item() == 4
    supervised_loss(session.model, batch).backward()  # no gradient yet: another step
    assert center.count.item() == 4
    torch.testing.assert_close(center.mean[0], normed.mean(dim=0))
    torch.testing.assert_close(seen[1][1], layer_norm(seen[1][0], seen[1][0].shape[-1:]) - center.mean)
    supervised_loss(session.model, batch)  # gradients wait: the same step, and the same centre
    assert center.count.item() == 4 and center.pending_count.item() == 8
    session.model.eval()
    for _ in range(2):
        supervised_loss(session.model, batch)
        assert center.count.item() == 12 and center.pending_count.item() == 0  # evaluation does not count
    name = next(n for n, m in session.model.named_modules() if m is center)
    assert ("base_model.mixlora_center" in name) == (route_on == "embedding")


def test_the_centre_is_a_running_mean_over_samples() -> None:
    center, routing = Center(3), routing_module.Routing()
    batches = [torch.randn(n, 3) for n in (5, 1, 8)]
    for batch in batches:
        center(batch, routing)
        routing = routing_module.Routing()
    center.eval()(batches[0], routing)
    every = layer_norm(torch.cat(batches), (3,))
    torch.testing.assert_close(center.mean[0], every.mean(dim=0))
    center.count.fill_(10 * WINDOW)  # later it forgets, a window of samples at a time
    center.train()(torch.tensor([[1.0, 2, 3]]), routing_module.Routing())
    center.eval()(batches[0], routing_module.Routing())
    step = layer_norm(torch.tensor([1.0, 2, 3]), (3,)) - every.mean(dim=0)
    torch.testing.assert_close(center.mean[0], every.mean(dim=0) + step / WINDOW)


@pytest.mark.parametrize("set_to_none", [True, False])
def test_a_step_is_noticed_however_gradients_are_cleared(make_recipe: Callable[..., Recipe], set_to_none: bool) -> None:
    session, batch = open_with(make_recipe, condition_norm="center")
    center = next(m for m in session.model.modules() if isinstance(m, Center))
    optimizer = torch.optim.SGD([p for p in session.model.parameters() if p.requires_grad], lr=1e-3)
    session.model.train()
    folded = []
    for _ in range(3):
        for _ in range(2):
            supervised_loss(session.model, batch).backward()
        folded.append(center.count.item())
        optimizer.step()
        optimizer.zero_grad(set_to_none=set_to_none)
    assert folded == [0, 8, 16]


@pytest.mark.parametrize("route_on", ["embedding", "instruction"])
def test_recomputing_a_layer_centres_as_before(
    make_recipe: Callable[..., Recipe], route_on: str, tmp_path: Path
) -> None:
    """Checkpointing runs layers twice; the running mean must move once, and the gradients must not change."""
    gradients, counts = [], []
    for enabled in (False, True):
        train = {"checkpointing": {"enabled": enabled}}
        session, batch = open_with(make_recipe, train, route_on=route_on, condition_norm="center")
        rows = load_conversations(session.recipe.data.train)
        make_trainer(session, rows, None, tmp_path, ProgressDisplay(Console(quiet=True)))  # turns checkpointing on
        session.model.train()
        for _ in range(2):
            supervised_loss(session.model, batch).backward()
        gradients.append({n: p.grad for n, p in session.model.named_parameters() if p.grad is not None})
        counts.append([m.pending_count.item() for m in session.model.modules() if isinstance(m, Center)])
    assert counts[0] == counts[1] and set(counts[0]) == {8.0}
    assert gradients[0].keys() == gradients[1].keys()
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], gradient, msg=name)


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
@pytest.mark.parametrize("pairing", ["tied", "independent", "conditional"])
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
