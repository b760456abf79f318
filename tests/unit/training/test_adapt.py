"""Out of memory: the run goes on from its last completed step, as a run with the edited recipe would have."""

from __future__ import annotations

import io
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from rich.console import Console
from safetensors.torch import load_file

from qmixlora.backbone.levers.table import LEVERS
from qmixlora.device import GIB
from qmixlora.errors import UserError
from qmixlora.memory import Advice, plan
from qmixlora.memory.advice import Saving
from qmixlora.recipe import Edit, Recipe, edited, load_recipe
from qmixlora.training import adapt, train, train_within_memory

from .card import NOISY, Card, assert_equal, records, resumed_from, weights
from .helpers import QUIET


# 4 steps are an epoch: within the first, and the first of the second
@pytest.mark.parametrize(
    "step", [pytest.param(3, marks=pytest.mark.long), pytest.param(5, marks=pytest.mark.exhaustive)]
)
def test_going_on_equals_a_run_with_the_edited_recipe_from_there(
    make_recipe: Callable[..., Recipe], tmp_path: Path, card: Card, step: int
) -> None:
    spec = {"max_steps": 7, "micro_batch_size": 8, "gradient_accumulation": 2, "save_every": 1, "keep_checkpoints": 9}
    plain = train(make_recipe(adapter=NOISY, train={**spec, "output": str(tmp_path / "plain")}), console=QUIET)
    order, rates = dict(card.steps), dict(card.rates)
    assert len(order) == 7 and len(order[1]) == 16 and len(order[4]) == 60 - 3 * 16
    smaller = make_recipe(adapter=NOISY, train={**spec, "micro_batch_size": 4, "gradient_accumulation": 4})
    expected = resumed_from(plain, step - 1, smaller, tmp_path / "expected")

    card.forgets()
    card.runs_out(step=step, above=4, nth=2)  # in the second micro-batch
    recipe = make_recipe(adapter=NOISY, train={**spec, "save_every": None, "output": str(tmp_path / "run")})
    folder = train_within_memory(recipe, console=QUIET)
    assert card.steps == order and card.rates == rates
    assert_equal(weights(folder), weights(expected))
    own, other = (load_file(f / "routing.safetensors") for f in (folder, expected))
    assert own.keys() == other.keys()
    for name, tensor in other.items():  # no sample of the failed step counts twice
        torch.testing.assert_close(own[name], tensor)
    assert card.alive[-1] == 0  # nothing of the failed attempt is in memory when the next one loads its model


CHANGES = {"micro_batch_size": 1, "gradient_accumulation": 18, "eval_batch_size": 2}


@pytest.fixture
def short_recipe(make_recipe: Callable[..., Recipe], card: Card, data: Path) -> Recipe:
    """A recipe of which the card holds two samples in training, and three in evaluation."""
    card.runs_out(above=2, during="training")
    card.runs_out(above=3, during="evaluation")
    return make_recipe(
        data={"validation": str(data / "validation.json")},
        train={"micro_batch_size": 6, "gradient_accumulation": 3, "eval_every": 2, "max_steps": 2},
    )


@pytest.mark.long  # the same run as the next test's
def test_what_was_changed_is_told_at_once_and_at_the_end(short_recipe: Recipe) -> None:
    screen = io.StringIO()
    train_within_memory(short_recipe, console=Console(file=screen, width=200))
    text = screen.getvalue()
    told = [
        "train.micro_batch_size=3 train.gradient_accumulation=6",
        "train.micro_batch_size=1 train.gradient_accumulation=18",
        "train.eval_batch_size=4",
        "train.eval_batch_size=2",
        "write into",
    ]
    positions = [text.index(line) for line in told]
    assert positions == sorted(positions)
    assert "Starting again" in text and "Going on from step 2" in text
    assert yaml.safe_load(text[text.index("train:\n") :].partition("\nor give")[0]) == {"train": CHANGES}


@pytest.mark.long
def test_what_was_changed_stands_in_the_runs_files(short_recipe: Recipe) -> None:
    folder = train_within_memory(short_recipe, console=QUIET)
    as_run = load_recipe(str(folder / "recipe.yaml")).train
    assert as_run.model_dump() == {**short_recipe.train.model_dump(), **CHANGES}
    changes = [record for record in records(folder) if "out_of_memory" in record]
    assert [(r["step"], r["out_of_memory"]) for r in changes] == [(0, "training")] * 2 + [(2, "evaluation")] * 2
    assert changes[0]["changed"] == {"train.micro_batch_size": 3, "train.gradient_accumulation": 6}


@pytest.mark.parametrize(
    "spec",
    [
        pytest.param({"eval_every": 2, "max_steps": 4}, marks=pytest.mark.long),
        pytest.param({"epochs": 2, "max_steps": None}, marks=pytest.mark.exhaustive),
    ],
)
def test_an_evaluation_that_ran_out_of_memory_is_made_up_for(
    make_recipe: Callable[..., Recipe], tmp_path: Path, card: Card, data: Path, spec: dict[str, Any]
) -> None:
    """Evaluations of 10 samples after steps, the last step among them, and after epochs of 4 steps."""

    def recipe(name: str) -> Recipe:
        batch = {"micro_batch_size": 8, "gradient_accumulation": 2, "output": str(tmp_path / name)}
        return make_recipe(adapter=NOISY, data={"validation": str(data / "validation.json")}, train={**spec, **batch})

    expected = train(recipe("expected"), console=QUIET)
    evaluated = {r["step"]: r["eval_loss"] for r in records(expected) if "eval_loss" in r}
    last = max(evaluated)
    for at in sorted(evaluated):
        card.forgets()
        card.runs_out(step=at, above=4, during="evaluation")
        folder = train_within_memory(recipe(f"run-{at}"), console=QUIET)
        losses = [(r["step"], r["eval_loss"]) for r in records(folder) if "eval_loss" in r]
        assert [step for step, _ in losses] == sorted(evaluated)
        for step, loss in losses:
            assert loss == pytest.approx(evaluated[step], rel=0.05)  # a mean over batches, which are smaller now
        assert max(card.steps) == last  # and none beyond
        assert_equal(weights(folder), weights(expected))


LAST = {"micro_batch_size": 1, "checkpointing": {"enabled": False}}  # no smaller batch is left


def stops(recipe: Recipe) -> str:
    """The message of a run that no lever helped."""
    with pytest.raises(UserError) as stopped:
        train_within_memory(recipe, console=QUIET)
    return str(stopped.value)


@pytest.mark.long
def test_where_nothing_is_left_one_message_says_how_far_it_came(make_recipe: Callable[..., Recipe], card: Card) -> None:
    card.runs_out(step=2)
    assert "last completed step is 1" in stops(make_recipe(train=LAST))


@pytest.mark.long
def test_after_the_batch_come_the_planners_edits_in_its_order(
    make_recipe: Callable[..., Recipe], card: Card, monkeypatch: pytest.MonkeyPatch
) -> None:
    card.runs_out(step=2)
    edits = ["train.optimizer=paged_adamw_8bit", "train.loss_chunk=64", "train.checkpointing.enabled=true"]
    levers = {lever.key: lever for lever in LEVERS}

    def planned(recipe: Recipe) -> Advice:
        names = ["train.optimizer", "train.loss_chunk", "train.checkpointing"]
        savings = [Saving(levers[name], Edit.parse([edit]), GIB, None) for name, edit in zip(names, edits, strict=True)]
        return Advice(plan(recipe, tokens=40), tuple(savings), None)

    monkeypatch.setattr(adapt, "plan_with_advice", planned)
    message = stops(make_recipe(train=LAST))
    assert "Tried: train.loss_chunk=64 train.checkpointing.enabled=true" in message
    assert "new run: train.optimizer=paged_adamw_8bit" in message


@pytest.mark.long
def test_without_a_plan_levers_come_in_the_order_of_what_they_cost(
    make_recipe: Callable[..., Recipe], card: Card, monkeypatch: pytest.MonkeyPatch
) -> None:
    card.runs_out(step=2)

    def unknown(recipe: Recipe) -> Advice:
        raise UserError("Images of such models cannot be planned yet.")

    monkeypatch.setattr(adapt, "plan_with_advice", unknown)
    message = stops(make_recipe(train=LAST))
    assert "Tried: train.checkpointing.enabled=true train.checkpointing.every_n_layers=1" in message
    assert "train.loss_chunk=32" in message


def test_a_run_that_is_to_stop_says_what_to_change(make_recipe: Callable[..., Recipe], card: Card) -> None:
    card.runs_out(step=3, above=2)
    message = stops(make_recipe(train={"on_oom": "stop", "save_every": None}))
    assert "last completed step is 2" in message
    assert "--resume and train.micro_batch_size=2 train.gradient_accumulation=2" in message


@pytest.mark.long
def test_a_run_that_stopped_goes_on_from_its_last_step(make_recipe: Callable[..., Recipe], card: Card) -> None:
    card.runs_out(step=3, above=2)
    recipe = make_recipe(train={"on_oom": "stop", "save_every": None})
    stops(recipe)
    smaller = edited(recipe, ["train.micro_batch_size=2", "train.gradient_accumulation=2"])
    card.steps.clear()
    folder = train_within_memory(smaller, resume=True, console=QUIET)
    assert set(card.steps) == {3, 4} and {r["step"] for r in records(folder)} == {1, 2, 3, 4}


def test_a_run_on_a_card_keeps_its_plan(make_recipe: Callable[..., Recipe], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("qmixlora.training.adapt.card_at_hand", lambda: 8 * 2**30)
    folder = train_within_memory(make_recipe(train={"max_steps": 1}), console=QUIET)
    kept = json.loads((folder / "plan.json").read_text(encoding="utf-8"))
    assert kept["card_gib"] == 8 and 0 < kept["peak_gib"] < 8 and kept["fits"]
