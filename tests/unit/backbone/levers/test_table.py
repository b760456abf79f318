"""The table of levers: its edits are valid, they come to an end, and what is said to learn the same does."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from qmixlora.backbone.levers import enable_checkpointing
from qmixlora.backbone.levers.table import LEVERS, Facts, Lever, lever_edits
from qmixlora.data import IGNORED, load_split
from qmixlora.loss import supervised_loss
from qmixlora.recipe import Edit, Recipe, validate
from qmixlora.session import open_session

FACTS = [Facts(), Facts(layers=5), Facts(layers=32, image_tokens=576)]
PARTS = ("loading", "features", "training", "evaluation")
EVERY_LEVER = pytest.mark.parametrize("lever", LEVERS, ids=lambda lever: lever.key)
MOST_EDITS = 30  # of one recipe: a lever has a few steps


def a_recipe(**sections: dict[str, Any]) -> Recipe:
    return validate({"data": {"train": "-"}, **sections, "model": {"id": "x", **sections.get("model", {})}}, "test")


STARTS = [
    a_recipe(train={"micro_batch_size": 12, "eval_batch_size": 7, "loss_chunk": None}),
    a_recipe(train={"checkpointing": {"enabled": False}, "loss_chunk": 100}),
    a_recipe(train={"checkpointing": {"every_n_layers": 3}}),
    a_recipe(model={"quantize_embeddings": "nf4", "stream_layers": 3}, train={"optimizer": "paged_adamw_8bit"}),
    a_recipe(model={"quantization": "none"}),
    a_recipe(data={"train": "-", "max_length": 512}, train={"batch_tokens": 4096}),
]


def steps_of(lever: Lever, recipe: Recipe, facts: Facts) -> list[Edit]:
    """The lever's edits one after another, as far as it goes."""
    edits: list[Edit] = []
    while (edit := lever.edit(recipe, facts)) is not None and len(edits) < MOST_EDITS:
        edits.append(edit)
        recipe = edit.apply(recipe)
    return edits


@EVERY_LEVER
@pytest.mark.parametrize("facts", FACTS)
@pytest.mark.parametrize("start", STARTS)
def test_a_levers_edit_is_valid_and_changes_the_recipe(start: Recipe, facts: Facts, lever: Lever) -> None:
    edit = lever.edit(start, facts)
    assert edit is None or edit.apply(start) != start


@pytest.mark.parametrize("part", PARTS)
@pytest.mark.parametrize("facts", FACTS)
@pytest.mark.parametrize("start", STARTS)
def test_levers_that_learn_the_same_come_to_an_end(start: Recipe, facts: Facts, part: Any) -> None:
    recipe = start
    for _ in range(MOST_EDITS):
        edits = [edit for lever, edit in lever_edits(recipe, facts, part=part) if lever.learns_the_same]
        if not edits:
            return
        recipe = edits[0].apply(recipe)
    pytest.fail(f"still {edits}")


@EVERY_LEVER
def test_every_lever_can_be_pulled_from_some_recipe(lever: Lever) -> None:
    assert any(lever.edit(start, FACTS[2]) for start in STARTS)


@EVERY_LEVER
def test_a_lever_is_called_by_a_value_that_it_edits(lever: Lever) -> None:
    paths = {path for start in STARTS for edit in steps_of(lever, start, FACTS[2])[:1] for path in edit.values}
    assert any(path == lever.key or path.startswith(lever.key + ".") for path in paths)


def test_the_effective_batch_stays_what_it_was() -> None:
    recipe = a_recipe(train={"micro_batch_size": 12, "gradient_accumulation": 3})
    lever = next(lever for lever in LEVERS if lever.key == "train.micro_batch_size")
    sizes = []
    for edit in steps_of(lever, recipe, Facts()):
        recipe = edit.apply(recipe)
        sizes.append((recipe.train.micro_batch_size, recipe.train.gradient_accumulation))
    assert sizes == [(6, 6), (3, 12), (1, 36)]


def test_levers_are_told_in_the_order_of_the_table() -> None:
    keys = [lever.key for lever, _ in lever_edits(STARTS[0], FACTS[2])]
    assert keys == [lever.key for lever in LEVERS if lever.key in keys] and len(keys) > 5


@pytest.mark.parametrize("part", PARTS)
def test_only_levers_that_help_a_part_are_told(part: Any) -> None:
    assert all(part in lever.helps for lever, _ in lever_edits(STARTS[0], FACTS[2], part=part))


@pytest.mark.parametrize("layers", range(1, 7))
def test_as_many_layers_are_streamed_as_a_recipe_and_the_model_allow(layers: int) -> None:
    lever = next(lever for lever in LEVERS if lever.key == "model.stream_layers")
    counts = [edit.values["model.stream_layers"] for edit in steps_of(lever, a_recipe(), Facts(layers))]
    assert counts == sorted(set(counts)) and all(3 <= count <= layers for count in counts)
    assert bool(counts) == (layers >= 3)


def whole_step(recipe: Recipe) -> tuple[float, dict[str, Tensor]]:
    """Loss and gradients of a step with all its micro-batches, the second of two."""
    rows = load_split(recipe.data, "train")
    session = open_session(recipe, sorted(set(rows["task"])))
    enable_checkpointing(session.backbone, session.anatomy, recipe.train.checkpointing)
    model, spec = session.model.train(), recipe.train
    for name, parameter in sorted(model.named_parameters()):
        if "mixlora_B" in name:
            torch.manual_seed(len(name))
            nn.init.normal_(parameter, std=0.1)
    for first in (0, 8):
        model.zero_grad()
        loss = 0.0
        starts = range(first, first + 8, spec.micro_batch_size)
        batches = [session.collator([rows[i] for i in range(at, at + spec.micro_batch_size)]) for at in starts]
        supervised = sum(int((batch["labels"][:, 1:] != IGNORED).sum()) for batch in batches)
        for batch in batches:
            part = supervised_loss(model, batch, supervised, chunk=spec.loss_chunk)
            part.backward()
            loss += part.item()
    return loss, {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("lever", [lever for lever in LEVERS if lever.learns_the_same], ids=lambda lever: lever.key)
def test_a_step_is_the_same_after_a_lever_that_learns_the_same(lever: Lever, recipe_of: Callable[..., Recipe]) -> None:
    batch = {"micro_batch_size": 8, "gradient_accumulation": 1, "loss_chunk": None}
    starts = [recipe_of({}, train={**batch, "checkpointing": {"enabled": enabled}}) for enabled in (True, False)]
    start, edit = next((start, edit) for start in starts if (edit := lever.edit(start, Facts(layers=5))))
    (loss, gradients), (other_loss, others) = whole_step(start), whole_step(edit.apply(start))
    assert other_loss == pytest.approx(loss, rel=1e-5)
    assert gradients.keys() == others.keys()
    for name, gradient in gradients.items():
        # fp32 sums in another order: a few roundings of the largest entry
        atol = 1e-5 * gradient.abs().max().item()
        torch.testing.assert_close(
            others[name], gradient, rtol=1e-4, atol=atol, msg=lambda text, n=name: f"{n}: {text}"
        )
