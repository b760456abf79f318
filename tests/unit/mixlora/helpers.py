"""Adapters away from their zero initialisation, and what a model makes of a batch with them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from peft import PeftModel
from torch import Tensor

from qmixlora.data import load_conversations
from qmixlora.mixlora import MixLoraLayer
from qmixlora.recipe import Recipe
from qmixlora.session import Session, open_session
from tests.adapters import randomize


def open_with(
    make_recipe: Callable[..., Recipe], train: dict[str, Any] | None = None, **adapter: Any
) -> tuple[Session, dict[str, Any]]:
    session = open_session(make_recipe(adapter=adapter, train=train or {}), ["color", "digit"])
    randomize(session.model, "mixlora_", std=0.3, seed=3)
    rows = load_conversations(session.recipe.data.train)
    return session, session.collator([rows[i] for i in range(4)])


def logits(model: Any, batch: dict[str, Any]) -> Tensor:
    with torch.no_grad():
        result: Tensor = model(**{k: v for k, v in batch.items() if k != "labels"}).logits
    return result


def bare(batch: dict[str, Any]) -> dict[str, Any]:
    return {k: v for k, v in batch.items() if k not in {"labels", "routing_mask", "segments", "tasks"}}


def randomize_with_centers(model: PeftModel) -> None:
    randomize(model, "mixlora_", std=0.3, seed=3)
    for name, buffer in model.named_buffers():
        if name.endswith("center.default.mean"):
            torch.nn.init.normal_(buffer, std=0.3)


def layers(model: PeftModel) -> list[MixLoraLayer]:
    return [module for module in model.modules() if isinstance(module, MixLoraLayer)]
