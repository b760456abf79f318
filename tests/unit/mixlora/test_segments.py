"""Each question of a conversation with its answer is one instance, in training and in generation alike."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from peft import get_peft_model
from rich.console import Console
from torch import Tensor
from torch.nn.functional import layer_norm

from qmixlora.data import IGNORED
from qmixlora.loss import supervised_loss
from qmixlora.mixlora import MixLoraConfig, routed_as
from qmixlora.mixlora.routing_record import RoutingStatistics
from qmixlora.mixlora.running_means import Center
from qmixlora.recipe import Recipe
from qmixlora.session import TunedSession
from qmixlora.training import make_trainer
from qmixlora.training.callbacks import ProgressDisplay

from .conversations import (
    CLOSE,
    ROUTES,
    TASKS,
    conversation,
    logits_by_hand,
    logits_of,
    mixed_rows,
    opened,
    padded_left,
    up_to,
)
from .helpers import layers

Make = Callable[..., Recipe]
PAIRINGS, GATES = ("conditional", "released", "tied"), ("hard", "straight_through", "weighted", "dense")
AXES = [
    *itertools.product(PAIRINGS, GATES, ["embedding"]),
    *itertools.product(["tied"], ["weighted"], ["all", "instruction", "task"]),
    *itertools.product(["conditional"], ["straight_through"], ["all", "instruction", "task"]),
]
every_route = pytest.mark.parametrize("route_on", ROUTES)


@pytest.fixture
def session(make_recipe: Make) -> TunedSession:
    return opened(make_recipe)


@pytest.mark.parametrize(("pairing", "gate", "route_on"), AXES)
def test_every_segment_is_routed_as_the_slow_reference_does(
    make_recipe: Make, pairing: str, gate: str, route_on: str
) -> None:
    session = opened(make_recipe, pairing=pairing, gate=gate, route_on=route_on)
    batch = session.collator(mixed_rows(session.recipe))
    for padded in (batch, padded_left(batch)):
        real_BS = padded["attention_mask"].bool()
        own, expected = logits_of(session.model, padded), logits_by_hand(session, padded)
        torch.testing.assert_close(own[real_BS], expected[real_BS], **CLOSE)


def test_segments_of_one_sample_are_routed_apart(session: TunedSession) -> None:
    logits_of(session.model, session.collator(mixed_rows(session.recipe)))
    first, second, third, *_ = session.model.base_model.last_selection()[0]
    assert not torch.allclose(first, second) and not torch.allclose(second, third)


@every_route
def test_neighbours_and_padding_change_no_answer(make_recipe: Make, route_on: str) -> None:
    session = opened(make_recipe, route_on=route_on)
    rows = mixed_rows(session.recipe)
    batch = session.collator(rows)
    together = logits_of(session.model, batch)
    for index, row in enumerate(rows):
        alone = logits_of(session.model, session.collator([row]))
        torch.testing.assert_close(together[index : index + 1, : alone.shape[1]], alone, **CLOSE)


def test_a_stock_forward_takes_the_whole_prompt_as_one_segment(session: TunedSession) -> None:
    inputs, routing = session.collator.routed_prompts(mixed_rows(session.recipe))
    stock = logits_of(session.model, inputs)
    assert session.model.base_model.last_selection().shape[1] == 3
    with routed_as(session.model, segments=inputs["attention_mask"] - 1, routing_mask=inputs["attention_mask"]):
        assert torch.equal(logits_of(session.model, inputs), stock)
    with routed_as(session.model, **routing):
        assert not torch.allclose(logits_of(session.model, inputs), stock)


@pytest.mark.parametrize("route_on", [*ROUTES, "all"])
def test_samples_of_one_segment_take_the_path_without_segments(make_recipe: Make, route_on: str) -> None:
    session = opened(make_recipe, route_on=route_on)
    batch = session.collator([conversation(session.recipe, 0), conversation(session.recipe, 3)])
    without = {name: value for name, value in batch.items() if name != "segments"}
    assert torch.equal(logits_of(session.model, batch), logits_of(session.model, without))
    assert session.model.base_model.mixlora_routing.current.segments is None


def test_to_a_router_on_all_positions_a_whole_sample_is_one_instance(make_recipe: Make) -> None:
    session = opened(make_recipe, route_on="all", pairing="conditional", condition_norm="none")
    batch = session.collator(mixed_rows(session.recipe))
    without = {name: value for name, value in batch.items() if name != "segments"}
    assert torch.equal(logits_of(session.model, batch), logits_of(session.model, without))
    assert session.model.base_model.last_selection().shape[1] == 3
    assert session.model.base_model.last_labels(batch["tasks"]) == ["color", "digit", "digit"]


@pytest.mark.parametrize("pairing", ["tied", "conditional"])
@pytest.mark.parametrize("route_on", ["embedding", "instruction"])
def test_recomputing_a_layer_gives_the_same_gradients(
    make_recipe: Make, route_on: str, pairing: str, tmp_path: Path
) -> None:
    gradients = []
    for enabled in (False, True):
        train = {"checkpointing": {"enabled": enabled}}
        session = opened(make_recipe, train, route_on=route_on, pairing=pairing)
        make_trainer(session, [], None, tmp_path, ProgressDisplay(Console(quiet=True)))  # type: ignore[arg-type]
        session.model.train()
        supervised_loss(session.model, session.collator(mixed_rows(session.recipe))).backward()
        gradients.append({n: p.grad for n, p in session.model.named_parameters() if p.grad is not None})
    assert gradients[0].keys() == gradients[1].keys()
    assert any("route" in name and gradient.any() for name, gradient in gradients[0].items())
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], gradient, msg=name)


def test_gradients_are_those_of_the_segments_one_by_one(session: TunedSession) -> None:
    """The loss of a conversation is that of its answers, each behind its own history."""
    row, model = mixed_rows(session.recipe)[0], session.model
    whole, apart = session.collator([row]), [session.collator([up_to(row, answer)]) for answer in range(3)]
    supervised_loss(model, whole, 1).backward()
    own = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    for answer, batch in enumerate(apart):
        batch["labels"][batch["segments"] != answer] = IGNORED
        supervised_loss(model, batch, 1).backward()
    for name, parameter in model.named_parameters():
        if name in own:
            atol = 1e-5 * max(1.0, float(own[name].abs().max()))
            torch.testing.assert_close(parameter.grad, own[name], rtol=1e-4, atol=atol, msg=name)


@pytest.mark.parametrize("route_on", ["embedding", "instruction"])
def test_the_centre_counts_segments(make_recipe: Make, route_on: str) -> None:
    session = opened(make_recipe, route_on=route_on)
    center = next(module for module in session.model.modules() if isinstance(module, Center))
    given: list[Tensor] = []
    center.register_forward_hook(lambda module, args, output: given.append(args[0]))
    supervised_loss(session.model.train(), session.collator(mixed_rows(session.recipe)))
    assert len(given[0]) == 6 and center.pending_count.item() == 6
    torch.testing.assert_close(center.pending[0], layer_norm(given[0], given[0].shape[-1:]).sum(dim=0))


def test_statistics_count_segments_for_their_own_tasks(session: TunedSession) -> None:
    batch = session.collator(mixed_rows(session.recipe))
    assert batch["tasks"] == [["color", "digit", "color"], "digit", "digit"]
    statistics = RoutingStatistics(session.model, TASKS)
    logits_of(session.model, batch)
    selection_LNEF = session.model.base_model.last_selection()
    statistics.add(batch["tasks"])
    means, count_T = statistics.take()
    assert count_T.tolist() == [4, 2]  # digit, color
    for mean_TEF, own_NEF in zip(means.values(), selection_LNEF, strict=True):
        torch.testing.assert_close(mean_TEF[1], own_NEF[[0, 2]].mean(dim=0))
        torch.testing.assert_close(mean_TEF[0], own_NEF[[1, 3, 4, 5]].mean(dim=0))


def test_task_mix_replaces_the_gates_of_segments(make_recipe: Make) -> None:
    session = opened(make_recipe, task_mix=1.0)
    model, layer = session.model.train(), layers(session.model)[0]
    batch = session.collator(mixed_rows(session.recipe))
    supervised_loss(model, batch)
    own_NEF = model.base_model.last_selection()[0]
    known = model.peft_config["default"].tasks
    for task, places in (("color", [0, 2]), ("digit", [1, 3, 4, 5])):
        mean = layer.mixlora_task_mean["default"][known.index(task)]
        torch.testing.assert_close(mean, own_NEF[places].mean(dim=0))
    assert layer.mixlora_task_count["default"].sum() == 6
    supervised_loss(model, batch)
    assert model.base_model.mixlora_routing.current.replaced["default"].tolist() == [True] * 6


def test_one_label_of_a_sample_is_that_of_all_its_segments(session: TunedSession) -> None:
    logits_of(session.model, session.collator(mixed_rows(session.recipe)))
    labels = session.model.base_model.last_labels(["a", "b", ["c", "d"]])
    assert labels == ["a", "a", "a", "b", "c", "d"]


def test_too_few_labels_of_a_sample_are_refused(session: TunedSession) -> None:
    logits_of(session.model, session.collator(mixed_rows(session.recipe)))
    with pytest.raises(ValueError, match="2 task labels for a sample of 3 segments"):
        session.model.base_model.last_labels([["a", "b"], "b", "c"])


def test_segments_with_a_gap_are_refused(session: TunedSession) -> None:
    batch = session.collator(mixed_rows(session.recipe))
    batch["segments"][0][batch["segments"][0] == 1] = 0
    with pytest.raises(ValueError, match="numbered one after the other"):
        logits_of(session.model, batch)


def test_segments_of_another_batch_are_refused(session: TunedSession) -> None:
    batch = session.collator(mixed_rows(session.recipe))
    with pytest.raises(ValueError, match="2 samples for a batch of 3"):
        logits_of(session.model, {**batch, "segments": batch["segments"][:2]})


def test_layers_that_read_images_take_no_segments(session: TunedSession) -> None:
    batch = session.collator(mixed_rows(session.recipe))
    adapted = get_peft_model(session.model.unload(), MixLoraConfig(target_modules=["fc1"], route_on="embedding"))
    with pytest.raises(ValueError, match="A target layer reads images"):
        logits_of(adapted, batch)


def test_questions_are_found_by_labels_and_segments_alone(session: TunedSession) -> None:
    batch = session.collator(mixed_rows(session.recipe))
    expected = logits_of(session.model, batch)
    with torch.no_grad():
        made = session.model(**{name: value for name, value in batch.items() if name != "routing_mask"}).logits
    assert torch.equal(made, expected)


@pytest.mark.parametrize("left_out", [("routing_mask", "labels"), ("routing_mask",)])
def test_segments_whose_questions_nobody_tells_are_refused(session: TunedSession, left_out: tuple[str, ...]) -> None:
    """With labels on the last answer alone, earlier answers would count as questions."""
    batch = session.collator([conversation(session.recipe, 0, 1)])
    batch["labels"] = batch["labels"].masked_fill(batch["segments"] == 0, IGNORED)
    with torch.no_grad(), pytest.raises(ValueError, match="to tell their questions"):
        session.model(**{name: value for name, value in batch.items() if name not in left_out})
