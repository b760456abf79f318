"""The loss: next-token cross-entropy where a sample is supervised, and logits nowhere else.

Shapes: B batch, S sequence, K positions with supervision, V vocabulary.
"""

from __future__ import annotations

import inspect
from typing import Any

from peft import PeftModel
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from .data import IGNORED
from .errors import UserError


def supervised_logits(model: nn.Module, inputs: dict[str, Any]) -> tuple[Tensor, Tensor]:
    """(logits B x K x V, targets B x K) at the positions that some sample of the batch supervises.

    `inputs` are the collator's. Only these positions reach lm_head (`logits_to_keep`): for short answers the B x S x V
    logits, the largest tensor of many steps, never exist.

    Raises:
        UserError: no token of the batch is supervised.
    """
    inputs = dict(inputs)
    targets_BS = inputs.pop("labels")[:, 1:]
    kept_K = (targets_BS != IGNORED).any(dim=0).nonzero().squeeze(1)
    if not len(kept_K):
        raise UserError(
            "A batch has no supervised token: there is nothing to learn from it.",
            where=f"tasks {sorted(set(inputs.get('tasks', [])))}",
            fix="Look at the data: every sample needs a non-empty answer.",
        )
    if takes_logits_to_keep(model):
        logits_BKV = model(**inputs, use_cache=False, logits_to_keep=kept_K).logits
    else:
        logits_BKV = model(**inputs, use_cache=False).logits[:, kept_K]
    return logits_BKV, targets_BS[:, kept_K]


def supervised_loss(model: nn.Module, inputs: dict[str, Any], num_items: Tensor | int | None = None) -> Tensor:
    """Next-token cross-entropy in fp32 over the supervised tokens, divided by `num_items` (default: their number).

    Raises UserError as `supervised_logits`.
    """
    logits_BKV, targets_BK = supervised_logits(model, inputs)
    total = cross_entropy(logits_BKV.float().flatten(0, 1), targets_BK.flatten(), ignore_index=IGNORED, reduction="sum")
    return total / ((targets_BK != IGNORED).sum() if num_items is None else num_items)


def takes_logits_to_keep(model: nn.Module) -> bool:
    """Whether the model's own forward can leave out positions."""
    base = model.get_base_model() if isinstance(model, PeftModel) else model
    return "logits_to_keep" in inspect.signature(base.forward).parameters
