"""Task interference: the paper's ratio, and that it is what a step really does to the loss."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from datasets import Dataset

from qmixlora.data import IGNORED, load_split, only_tasks
from qmixlora.errors import UserError
from qmixlora.inspection.interference import Interference, interference_matrix, measure_interference
from qmixlora.loss import supervised_loss
from qmixlora.recipe import Recipe
from qmixlora.session import Session, open_model, open_session
from tests.adapters import randomize
from tests.unit.mixlora.conversations import conversation


def test_the_ratio_is_1_for_the_task_itself_0_across_and_negative_against() -> None:
    gradients = torch.tensor([[[1.0, 0.0]], [[0.0, 2.0]], [[-3.0, 0.0]]])
    expected = torch.tensor([[1.0, 0.0, -1.0], [0.0, 1.0, 0.0], [-1.0, 0.0, 1.0]])
    torch.testing.assert_close(interference_matrix(gradients), expected)


def test_the_ratio_is_averaged_over_batches() -> None:
    # task 0: its two batches point along x and y; task 1 points along x
    gradients = torch.tensor([[[2.0, 0.0], [0.0, 4.0]], [[1.0, 0.0], [1.0, 0.0]]])
    # E[g_0/|g_0|] = (1/2, 1/2): own change 1 and 2; task 1's step changes the batches by 2 and 0
    expected = torch.tensor([[1.0, (2 / 1 + 0 / 2) / 2], [0.5, 1.0]])
    torch.testing.assert_close(interference_matrix(gradients), expected)


def test_a_task_at_rest_has_no_ratio() -> None:
    matrix = interference_matrix(torch.tensor([[[0.0, 0.0]], [[1.0, 0.0]]]))
    assert matrix[0].isnan().all() and matrix[1].tolist() == [0.0, 1.0]


@pytest.fixture
def session(make_recipe: Callable[..., Recipe]) -> Session:
    session = open_session(make_recipe(adapter={"projector": "frozen"}), ["digit"])
    randomize(session.model, "mixlora_B", std=0.05, seed=0)
    session.model.eval()
    return session


def test_it_is_what_a_step_does_to_the_loss(session: Session) -> None:
    rows = load_split(session.recipe.data, "train")
    tasks = ["count", "digit"]
    chosen = {task: only_tasks(rows, [task], "train") for task in tasks}
    both = rows.select([i for i, task in enumerate(rows["task"]) if task in tasks])
    interference = measure_interference(session, both, batches=1, batch_size=6)

    layer, pool = "model.language_model.layers.0.self_attn.v_proj", "B"
    weight = session.model.base_model.model.get_submodule(layer).mixlora_B["default"]
    batches = {task: session.collator([chosen[task][i] for i in range(6)]) for task in tasks}

    def loss(task: str) -> torch.Tensor:
        return supervised_loss(session.model, batches[task])

    def change(of: str, by: str) -> float:
        (gradient,) = torch.autograd.grad(loss(by), weight)
        step = 1e-2 * gradient / gradient.norm()
        with torch.no_grad():
            weight.add_(step)
            above = loss(of)
            weight.sub_(2 * step)
            below = loss(of)
            weight.add_(step)
        return float(above - below)  # twice the first-order gain; the second order cancels

    for i, task in enumerate(tasks):
        for j, other in enumerate(tasks):
            expected = change(task, other) / change(task, task)
            assert float(interference.matrices[layer, pool][i, j]) == pytest.approx(expected, rel=0.02, abs=0.01)


def test_the_model_is_left_as_it_was(session: Session) -> None:
    before = {name: (p.requires_grad, p.grad) for name, p in session.model.named_parameters()}
    session.model.train()
    measure_interference(session, load_split(session.recipe.data, "train"), batches=2, batch_size=2)
    assert session.model.training
    assert {name: (p.requires_grad, p.grad) for name, p in session.model.named_parameters()} == before


@pytest.fixture
def interference(session: Session) -> Interference:
    return measure_interference(session, load_split(session.recipe.data, "train"), batches=2, batch_size=2)


def test_a_task_does_not_disturb_itself(interference: Interference) -> None:
    assert interference.mean("A").shape == (10, 10)
    torch.testing.assert_close(interference.mean("B").diagonal(), torch.ones(10))


def test_conflicts_are_between_tasks_and_harm_the_worst_first(interference: Interference) -> None:
    conflicts = interference.conflicts(5)
    assert len(conflicts) == 5
    assert all(cause != harmed and value < 0 for _, cause, harmed, value in conflicts)
    assert [value for *_, value in conflicts] == sorted(value for *_, value in conflicts)


def test_the_file_of_interference_has_the_mean_and_every_layer(interference: Interference) -> None:
    content = interference.to_dict()
    assert content["tasks"] == interference.tasks and content["mean"].keys() == {"A", "B"}
    assert len(content["layers"]) == 14 and all(pools.keys() == {"A", "B"} for pools in content["layers"].values())
    mean = torch.tensor([[float("nan") if value is None else value for value in row] for row in content["mean"]["B"]])
    torch.testing.assert_close(mean, interference.mean("B"), atol=1e-4, rtol=0, equal_nan=True)


def test_lora_is_measured_too(make_recipe: Callable[..., Recipe]) -> None:
    session = open_session(make_recipe(adapter={"method": "lora"}), [])
    interference = measure_interference(session, load_split(session.recipe.data, "train"), batches=1, batch_size=2)
    assert {pool for _, pool in interference.matrices} == {"A", "B"} and len(interference.matrices) == 2 * 14


def test_one_task_alone_cannot_interfere(session: Session) -> None:
    rows = load_split(session.recipe.data, "train")
    with pytest.raises(UserError, match="only one"):
        measure_interference(session, only_tasks(rows, ["digit"], "train"))


def test_a_model_without_an_adapter_has_nothing_to_measure(make_recipe: Callable[..., Recipe]) -> None:
    bare = open_model(make_recipe())
    with pytest.raises(UserError, match="this model has none"):
        measure_interference(bare, load_split(bare.recipe.data, "train"), batches=1)


def test_a_task_with_fewer_samples_than_batches_is_named(session: Session) -> None:
    with pytest.raises(UserError, match="Too few samples for 9 batches"):
        measure_interference(session, load_split(session.recipe.data, "train"), batches=9)


def test_a_task_is_disturbed_in_its_own_answers_of_a_conversation(session: Session) -> None:
    """Conversations of two tasks measure as much as the two answers of each, learned apart behind the same history."""
    rows = [conversation(session.recipe, *turns, tasks=["color", "digit"]) for turns in [(2, 0), (1, 3)]]
    own = measure_interference(session, Dataset.from_list(rows), batches=2, batch_size=1)
    assert own.tasks == ["color", "digit"]
    layer, pool = "model.language_model.layers.0.self_attn.v_proj", "B"
    weight = session.model.base_model.model.get_submodule(layer).mixlora_B["default"]
    gradients = []
    for number in range(2):
        for row in rows:
            batch = session.collator([row])
            batch["labels"][batch["segments"] != number] = IGNORED
            (gradient,) = torch.autograd.grad(supervised_loss(session.model, batch), weight)
            gradients.append(gradient.flatten())
    expected = interference_matrix(torch.stack(gradients).view(2, 2, -1))
    torch.testing.assert_close(own.matrices[layer, pool], expected, rtol=1e-3, atol=1e-3, equal_nan=True)
