"""Evaluation takes what is planned: the prompt's pass, the cache as it grows, the validation loss."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from qmixlora.adapter import adapter_config
from qmixlora.device import GIB
from qmixlora.memory import plan
from qmixlora.memory.architectures import config_of
from qmixlora.memory.evaluation import EvaluationPlan, plan_evaluation
from qmixlora.memory.planner import CONTEXT, WORKSPACES, room_on
from qmixlora.memory.simulation.batch import synthetic_batch
from qmixlora.memory.simulation.step import simulate
from qmixlora.memory.simulation.work import prefill
from qmixlora.recipe import Recipe, edited
from qmixlora.session import with_fresh_adapter
from qmixlora.training.probe import peak_of, random_backbone

from .helpers import LLAVA_7B, in_fp32, recipe_of

CPU = torch.device("cpu")
RECIPE = recipe_of(LLAVA_7B, eval_batch_size=4)


def generated(recipe: Recipe, tokens: int, new_tokens: int) -> int:
    """Bytes at the peak of a real generation with random weights, on a CPU."""
    config = config_of(recipe.model)
    backbone, anatomy = random_backbone(config, recipe.model, CPU)
    model: Any = with_fresh_adapter(recipe, backbone, adapter_config(recipe.adapter, anatomy, ("a",))).eval()
    inputs = dict(synthetic_batch(config, recipe, tokens).inputs)
    inputs["pixel_values"] = torch.randn(inputs["pixel_values"].shape)
    prompt = {name: value for name, value in inputs.items() if name not in ("labels", "routing_mask", "tasks")}

    def work() -> None:
        with torch.inference_mode():
            model.generate(**prompt, max_new_tokens=new_tokens, min_new_tokens=new_tokens, do_sample=False)

    return peak_of(work, model, CPU)


def planned_tensors(recipe: Recipe, tokens: int, new_tokens: int) -> int:
    """The plan without what is beside tensors in a process on a card."""
    samples = recipe.train.micro_batch_size
    recipe = edited(recipe, [f"train.max_new_tokens={new_tokens}", f"train.eval_batch_size={samples}"])
    config = config_of(recipe.model)
    gaps = simulate(recipe, config, synthetic_batch(config, recipe, tokens), prefill).gaps
    return plan_evaluation(recipe, tokens=tokens).generation - CONTEXT - WORKSPACES - gaps


@pytest.mark.parametrize("new_tokens", [1, pytest.param(250, marks=pytest.mark.long)])
def test_generation_takes_what_was_planned(wide: Path, new_tokens: int) -> None:
    """The prompt's pass, and where many tokens follow it the cache."""
    recipe = in_fp32(recipe_of(str(wide), {"dropout": 0.0}, micro_batch_size=12))
    with torch.backends.mkldnn.flags(enabled=False):
        measured = generated(recipe, 48, new_tokens)
    assert planned_tensors(recipe, 48, new_tokens) == pytest.approx(measured, rel=0.015)


def test_the_cache_is_two_vectors_per_token_and_layer() -> None:
    """So that answers of 1,000 more tokens take 1,000 more of them, once they outgrow the prompt's pass."""
    few, many = (
        plan_evaluation(edited(RECIPE, [f"train.max_new_tokens={count}"]), tokens=700) for count in (4000, 5000)
    )
    per_token = 2 * 32 * 4096 * 2 * RECIPE.train.eval_batch_size
    assert many.generation - few.generation == pytest.approx(1000 * per_token, rel=0.02)


def test_generation_holds_no_states_of_the_optimizer_and_validation_does() -> None:
    with_validation = edited(RECIPE, ['data.validation="-"'])
    eight_bit = edited(with_validation, ["train.optimizer=adamw_8bit"])
    one, other = (plan_evaluation(recipe, tokens=700) for recipe in (with_validation, eight_bit))
    assert one.generation == other.generation
    saved = plan(with_validation, tokens=700).parts.optimizer - plan(eight_bit, tokens=700).parts.optimizer
    assert one.validation is not None and other.validation is not None
    assert one.validation - other.validation == saved


def test_answers_in_a_run_lie_beside_its_optimizer_and_record() -> None:
    recipe = edited(RECIPE, ['data.validation="-"', "train.eval_generate=100"])
    planned, parts = plan_evaluation(recipe, tokens=700), plan(recipe, tokens=700).parts
    assert planned.generation_in_run == planned.generation + parts.optimizer + parts.routing_sums == planned.peak
    assert planned.to_dict()["generation_in_run_gib"] == planned.peak / GIB
    without = plan_evaluation(edited(recipe, ["train.eval_generate="]), tokens=700)
    assert without.generation == planned.generation and without.generation_in_run is None


@pytest.mark.parametrize("levers", [["train.cache_features=true"], ["train.mlp_chunk=64"]])
def test_answers_outside_of_a_run_are_of_the_model_as_it_is_opened(levers: list[str]) -> None:
    """With its vision tower and whole MLPs, whatever the run did without."""
    recipe = edited(RECIPE, ["adapter.projector=frozen", 'data.validation="-"'])
    usual, with_lever = (plan_evaluation(edited(recipe, own), tokens=700) for own in ([], levers))
    assert with_lever.generation == usual.generation
    assert usual.validation is not None and with_lever.validation is not None
    assert with_lever.validation < usual.validation


def test_the_record_of_every_task_is_there_while_a_run_evaluates(
    make_recipe: Callable[..., Recipe], write_json: Callable[[str, Any], Path]
) -> None:
    def planned(tasks: list[str]) -> EvaluationPlan:
        turns = [{"from": "human", "value": "what color ?"}, {"from": "gpt", "value": "red"}]
        rows = [{"conversations": turns, "task": task} for task in tasks]
        path = str(write_json(f"{len(set(tasks))}.json", rows))
        return plan_evaluation(make_recipe(data={"train": path, "validation": path}, train={"eval_generate": 4}))

    one, many = planned(["a"] * 20), planned([f"task {index}" for index in range(20)])
    of_a_task = plan(make_recipe(), tokens=64).parts.routing_sums
    assert of_a_task > 0 and one.generation == many.generation
    for own, of_many in ((one.validation, many.validation), (one.generation_in_run, many.generation_in_run)):
        assert own is not None and of_many is not None
        assert of_many - own == 19 * of_a_task


def test_without_validation_data_only_answers_are_planned() -> None:
    planned = plan_evaluation(RECIPE, tokens=700)
    assert planned.validation is None and planned.peak == planned.generation and planned.fits is None


def test_where_all_samples_do_not_fit_it_says_how_many_do() -> None:
    card = 7 * GIB
    planned = plan_evaluation(edited(RECIPE, ["train.eval_batch_size=32"]), card=card, tokens=700)
    assert planned.fits is False and planned.samples_that_fit is not None
    for samples, fits in ((planned.samples_that_fit, True), (planned.samples_that_fit + 1, False)):
        recipe = edited(RECIPE, [f"train.eval_batch_size={samples}"])
        assert (plan_evaluation(recipe, tokens=700).peak <= room_on(card)) is fits
