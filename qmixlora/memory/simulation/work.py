"""What a run does with a batch, to be simulated: a training step, the validation loss, the answers of generation."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from peft import PeftModel

from qmixlora.loss import supervised_loss
from qmixlora.recipe import Recipe

from .account import Account

# tells the account when the forward pass is over, which leaves what the next pass needs: activations, or a cache
Work = Callable[[PeftModel, Recipe, dict[str, Any], Account], None]


def training_step(model: PeftModel, recipe: Recipe, inputs: dict[str, Any], account: Account) -> None:
    """The loss of a micro-batch and its gradients."""
    loss = supervised_loss(model, inputs, chunk=recipe.train.loss_chunk)
    inputs.clear()  # the Trainer lets the batch go here
    account.forward_is_over()
    loss.backward()


def validation(model: PeftModel, recipe: Recipe, inputs: dict[str, Any], account: Account) -> None:
    """The loss alone."""
    model.eval()
    with torch.no_grad():
        supervised_loss(model, inputs, chunk=recipe.train.loss_chunk)
    account.forward_is_over()


def prefill(model: PeftModel, recipe: Recipe, inputs: dict[str, Any], account: Account) -> None:
    """The first step of generation, as `generate` calls it: keys and values of the whole prompt, logits of its end."""
    model.eval()
    backbone: Any = model.get_base_model()
    beside = ("labels", "segments", "routing_mask", "tasks")
    prompt = {name: value for name, value in inputs.items() if name not in beside}
    if backbone._supports_logits_to_keep():
        prompt["logits_to_keep"] = 1
    with torch.no_grad():
        cache = model(**prompt, use_cache=True).past_key_values
    account.forward_is_over()
    del cache
    account.saved -= account.live
