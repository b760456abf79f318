"""Conditions on one scale, around a running mean over samples that moves once per optimiser step."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from rich.console import Console
from torch import Tensor
from torch.nn.functional import layer_norm

from qmixlora.data import load_conversations
from qmixlora.loss import supervised_loss
from qmixlora.mixlora.routing import Routing
from qmixlora.mixlora.running_means import WINDOW, Center
from qmixlora.recipe import Recipe
from qmixlora.session import Session
from qmixlora.training import make_trainer
from qmixlora.training.callbacks import ProgressDisplay

from .helpers import open_with

ROUTES = pytest.mark.parametrize("route_on", ["embedding", "instruction"])


def centers_of(session: Session) -> list[Center]:
    return [module for module in session.model.modules() if isinstance(module, Center)]


def watch(center: Center) -> list[tuple[Tensor, Tensor]]:
    """The conditions that a centre gets and gives from now on."""
    seen: list[tuple[Tensor, Tensor]] = []
    center.register_forward_hook(lambda module, args, output: seen.append((args[0].detach(), output.detach())))
    return seen


def normed(condition_BD: Tensor) -> Tensor:
    return layer_norm(condition_BD, condition_BD.shape[-1:])


@ROUTES
def test_conditions_of_the_first_step_are_layer_normalised_alone(
    make_recipe: Callable[..., Recipe], route_on: str
) -> None:
    session, batch = open_with(make_recipe, route_on=route_on, condition_norm="center")
    center = centers_of(session)[0]
    seen = watch(center)
    supervised_loss(session.model.train(), batch)
    [(given, made)] = seen
    torch.testing.assert_close(made, normed(given))
    assert center.count.item() == 0 and center.pending_count.item() == 4


@ROUTES
def test_conditions_lose_the_mean_of_the_steps_before(make_recipe: Callable[..., Recipe], route_on: str) -> None:
    session, batch = open_with(make_recipe, route_on=route_on, condition_norm="center")
    center = centers_of(session)[0]
    seen = watch(center)
    supervised_loss(session.model.train(), batch)
    supervised_loss(session.model, batch)  # no gradient yet: another step
    (first, _), (second, made) = seen
    assert center.count.item() == 4
    torch.testing.assert_close(center.mean[0], normed(first).mean(dim=0))
    torch.testing.assert_close(made, normed(second) - center.mean)


@ROUTES
def test_the_centre_rests_while_gradients_wait(make_recipe: Callable[..., Recipe], route_on: str) -> None:
    session, batch = open_with(make_recipe, route_on=route_on, condition_norm="center")
    center = centers_of(session)[0]
    supervised_loss(session.model.train(), batch)
    supervised_loss(session.model, batch).backward()
    before = center.mean.clone()
    supervised_loss(session.model, batch)
    assert torch.equal(center.mean, before)
    assert center.count.item() == 4 and center.pending_count.item() == 8


@ROUTES
def test_evaluation_takes_up_what_waits_and_adds_nothing(make_recipe: Callable[..., Recipe], route_on: str) -> None:
    session, batch = open_with(make_recipe, route_on=route_on, condition_norm="center")
    center = centers_of(session)[0]
    supervised_loss(session.model.train(), batch)
    session.model.eval()
    for _ in range(2):
        supervised_loss(session.model, batch)
        assert center.count.item() == 4 and center.pending_count.item() == 0


@pytest.mark.parametrize(("route_on", "count"), [("embedding", 1), ("instruction", 14)])
def test_layers_share_a_centre_where_they_share_the_condition(
    make_recipe: Callable[..., Recipe], route_on: str, count: int
) -> None:
    session, _ = open_with(make_recipe, route_on=route_on, condition_norm="center")
    assert len(centers_of(session)) == count


def take(center: Center, *batches: Tensor) -> None:
    """Train on batches, each a step of its own, and take up what waits."""
    for batch in batches:
        center.train()(batch, Routing())
    center.eval()(batches[0], Routing())


def test_the_centre_is_the_mean_over_all_samples_at_first() -> None:
    center, batches = Center(3), [torch.randn(n, 3) for n in (5, 1, 8)]
    take(center, *batches)
    torch.testing.assert_close(center.mean[0], normed(torch.cat(batches)).mean(dim=0))


def test_later_the_centre_forgets_a_window_of_samples_at_a_time() -> None:
    center = Center(3)
    take(center, torch.randn(14, 3))
    before, sample = center.mean.clone(), torch.tensor([[1.0, 2, 3]])
    center.count.fill_(10 * WINDOW)
    take(center, sample)
    torch.testing.assert_close(center.mean, before + (normed(sample) - before) / WINDOW)


@pytest.mark.parametrize("set_to_none", [True, False])
def test_a_step_is_noticed_however_gradients_are_cleared(make_recipe: Callable[..., Recipe], set_to_none: bool) -> None:
    session, batch = open_with(make_recipe, condition_norm="center")
    center = centers_of(session)[0]
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
        counts.append([center.pending_count.item() for center in centers_of(session)])
    assert counts[0] == counts[1] and set(counts[0]) == {8.0}
    assert gradients[0].keys() == gradients[1].keys()
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], gradient, msg=name)
