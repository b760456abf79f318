"""Edits of a recipe that save memory, each planned like the recipe itself."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from qmixlora.recipe import Recipe, validate

from .cards import GIB
from .planner import MARGIN, plan

WORTH = GIB // 100  # an edit that saves less is not mentioned


def plan_with_advice(recipe: Recipe, *, card: int | None = None, tokens: int | None = None) -> dict[str, Any]:
    """`Plan.to_dict`, with `advice`: a list of `edit` (overrides as on the command line) and `saves_gib`.

    Raises UserError as `plan`.
    """
    found = plan(recipe, card=card, tokens=tokens)
    savings = {
        " ".join(edits): found.peak - plan(edited(recipe, edits), tokens=found.tokens).peak for edits in _edits(recipe)
    }
    largest_first = sorted(savings.items(), key=lambda item: -item[1])
    advice = [{"edit": edit, "saves_gib": saved / GIB} for edit, saved in largest_first if saved >= WORTH]
    needed = None if card is None else MARGIN * card / GIB
    return {**found.to_dict(), "needed_margin_gib": needed, "advice": advice}


def edited(recipe: Recipe, edits: Sequence[str]) -> Recipe:
    """The recipe with overrides (`train.optimizer=adamw`) put in."""
    values = recipe.model_dump()
    for edit in edits:
        path, _, value = edit.partition("=")
        *sections, key = path.split(".")
        target = values
        for section in sections:
            target = target[section]
        target[key] = {"true": True, "false": False}.get(value, int(value) if value.isdigit() else value)
    return validate(values, "advice")


def _edits(recipe: Recipe) -> list[list[str]]:
    """What could be changed without changing what is learned, and then what changes little."""
    spec, found = recipe.train, []
    if spec.optimizer == "adamw":
        found.append(["train.optimizer=paged_adamw_8bit"])
    if not spec.checkpointing.enabled:
        found.append(["train.checkpointing.enabled=true"])
    elif spec.checkpointing.every_n_layers > 1:
        found.append(["train.checkpointing.every_n_layers=1"])
    if spec.micro_batch_size > 1:
        half = spec.micro_batch_size // 2
        steps = spec.gradient_accumulation * spec.micro_batch_size // half
        found.append([f"train.micro_batch_size={half}", f"train.gradient_accumulation={steps}"])
    if recipe.adapter.train_projector:
        found.append(["adapter.train_projector=false"])
    return found
