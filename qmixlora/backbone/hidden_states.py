"""A model as a body (everything up to the last hidden states) and a head (lm_head, and the soft caps and scales that a
family adds to it), so that logits exist where they are wanted and nowhere else.

Shapes: B batch, S sequence, C tokens, D width of the decoder, V vocabulary.

Both are run by the model's own forward: the body with one position left for the head; the head with the body's output
in place of the body.
"""

from __future__ import annotations

import copy
from collections import OrderedDict
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, cast

from peft import PeftModel
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.utils.generic import ModelOutput


class Head:
    """Computes logits from states (C x D to C x V)."""

    def __init__(self, model: PreTrainedModel, body: nn.Module, outputs: ModelOutput) -> None:
        self.model, self.body, self.outputs = model, body, outputs

    def __call__(self, states_CD: Tensor) -> Tensor:
        states_1CD = states_CD[None]
        with _forward_replaced(self.body, _with_states(self.outputs, states_1CD)):
            # past the hooks: this is no new batch
            logits_1CV: Tensor = self.model.forward(inputs_embeds=states_1CD, use_cache=False).logits
        return logits_1CV[0]


def run_body(model: nn.Module, inputs: dict[str, Any]) -> tuple[Tensor, Head]:
    """Run a batch without labels through the model and all its hooks; return (last hidden states: B x S x D, head)."""
    inner = cast(PreTrainedModel, model.get_base_model() if isinstance(model, PeftModel) else model)
    body = inner.base_model if inner.base_model is not inner else inner.get_decoder()
    seen: list[ModelOutput] = []

    def keep_one_position(_: nn.Module, __: Any, outputs: ModelOutput) -> ModelOutput:
        seen.append(outputs)
        # a view of them would be multiplied sample by sample, for which a CPU copies the head's weight in 16 bits
        return _with_states(outputs, outputs[0][:, :1].contiguous())

    hook = body.register_forward_hook(keep_one_position)
    try:
        model(**inputs, use_cache=False)
    finally:
        hook.remove()
    outputs = seen.pop()
    states_BSD: Tensor = outputs[0]
    return states_BSD, Head(inner, body, _with_states(outputs, states_BSD[:, :0]))


def _with_states(outputs: ModelOutput, states: Tensor) -> ModelOutput:
    """The body's output with other last hidden states (its first field)."""
    changed = copy.copy(outputs)
    changed[next(iter(outputs))] = states
    return changed


@contextmanager
def _forward_replaced(module: nn.Module, outputs: ModelOutput) -> Iterator[None]:
    """Have a module return these outputs for a block, whatever its inputs, and call none of its hooks."""
    own = module.__dict__.get("forward")  # set by those that wrap modules, such as accelerate
    hooks = module._forward_pre_hooks, module._forward_hooks
    module.__dict__["forward"] = lambda *_, **__: outputs
    module._forward_pre_hooks, module._forward_hooks = OrderedDict(), OrderedDict()
    try:
        yield
    finally:
        module._forward_pre_hooks, module._forward_hooks = hooks
        if own is None:
            del module.__dict__["forward"]
        else:
            module.__dict__["forward"] = own
