"""The selection that a model keeps of its last batch: every layer's mixing matrices."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from qmixlora.mixlora import MixLoraConfig
from qmixlora.recipe import Recipe
from qmixlora.session import Session, open_session

from .helpers import layers, logits, randomize_with_centers


def test_the_last_selection_has_every_layers_mixing_matrices_in_the_order_of_the_model(
    session: Session, batch: dict[str, Any]
) -> None:
    randomize_with_centers(session.model)
    logits(session.model.eval(), batch)
    selection_LBEF = session.model.base_model.last_selection()
    matrices = session.model.base_model.mixlora_routing.current.cache.mixing_matrices
    assert selection_LBEF.shape == (14, 4, 4, 4)
    for layer, matrix_BEF in zip(layers(session.model), selection_LBEF, strict=True):
        assert torch.equal(matrix_BEF, matrices[layer, "default"])


def test_the_last_selection_has_no_graph(session: Session, batch: dict[str, Any]) -> None:
    randomize_with_centers(session.model)
    session.model.train()(**batch)
    assert not session.model.base_model.last_selection().requires_grad


def test_the_last_selection_is_of_the_batch_that_was_last_in_the_model(session: Session, batch: dict[str, Any]) -> None:
    randomize_with_centers(session.model)
    model = session.model.eval()
    logits(model, batch)
    whole = model.base_model.last_selection()
    logits(model, {name: value[2:] for name, value in batch.items()})
    torch.testing.assert_close(model.base_model.last_selection(), whole[:, 2:])


def test_the_last_selection_is_of_the_active_adapter(session: Session, batch: dict[str, Any]) -> None:
    other = MixLoraConfig(num_factors=3, r=2, target_modules=session.model.peft_config["default"].target_modules)
    session.model.add_adapter("other", other)
    session.model.set_adapter("other")
    logits(session.model.eval(), batch)
    assert session.model.base_model.last_selection().shape == (14, 4, 3, 3)


def test_the_last_selection_does_not_show_task_mix(make_recipe: Callable[..., Recipe], batch: dict[str, Any]) -> None:
    session = open_session(make_recipe(adapter={"task_mix": 1.0, "condition_norm": "none"}), sorted({*batch["tasks"]}))
    randomize_with_centers(session.model)
    model = session.model.train()
    model(**batch)
    own = model.base_model.last_selection()[0]  # the first layer's input is the same again
    model(**batch)
    assert model.base_model.mixlora_routing.current.replaced["default"].all()
    torch.testing.assert_close(model.base_model.last_selection()[0], own)
