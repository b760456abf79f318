"""The loss: next-token cross-entropy where a sample is supervised, and logits nowhere else, some tokens at a time.

Shapes: B batch, S sequence, N supervised tokens of the batch, C tokens of a chunk, D width, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from torch import Tensor, nn
from torch.nn.functional import cross_entropy, pad
from torch.utils.checkpoint import checkpoint

from .backbone.hidden_states import Head, run_body
from .data import IGNORED
from .errors import UserError


def supervised_logits(model: nn.Module, inputs: dict[str, Any]) -> Tensor:
    """The logits of the supervised tokens of a batch (N x V). `inputs` are the collator's.

    Raises:
        UserError: no token of the batch is supervised.
    """
    (logits_NV,) = supervised_logits_in_chunks(model, inputs, None)
    return logits_NV


def supervised_logits_in_chunks(model: nn.Module, inputs: dict[str, Any], chunk: int | None) -> Iterator[Tensor]:
    """The same, of at most `chunk` tokens (default: all) at a time (C x V). Raises UserError as `supervised_logits`."""
    states_ND, _, head = _supervised_states(model, inputs)
    for states_CD in states_ND.split(chunk or len(states_ND)):
        yield head(states_CD)


def supervised_loss(
    model: nn.Module, inputs: dict[str, Any], num_items: Tensor | int | None = None, *, chunk: int | None = None
) -> Tensor:
    """Next-token cross-entropy in fp32 over the supervised tokens, divided by `num_items` (default: their number).

    The logits of at most `chunk` tokens (default: all) exist at a time; the backward pass computes them again.

    Raises UserError as `supervised_logits`.
    """
    states_ND, targets_N, head = _supervised_states(model, inputs)

    def total(states_CD: Tensor, targets_C: Tensor) -> Tensor:
        return cross_entropy(head(states_CD).float(), targets_C, reduction="sum")

    count = len(targets_N)
    if chunk is None or count <= chunk:
        loss = total(states_ND, targets_N)
    else:
        chunks = zip(states_ND.split(chunk), targets_N.split(chunk), strict=True)
        loss = sum(checkpoint(total, *part, use_reentrant=False, preserve_rng_state=False) for part in chunks)
    return loss / (count if num_items is None else num_items)


def _supervised_states(model: nn.Module, inputs: dict[str, Any]) -> tuple[Tensor, Tensor, Head]:
    """The last hidden states (N x D) and targets (N) of the supervised tokens, and the model's head.

    The positions are looked up where the labels lie: as long as those are on the host, it need not wait for a card.
    """
    targets_BS = pad(inputs["labels"][:, 1:], (0, 1), value=IGNORED)
    positions_N = (targets_BS.flatten() != IGNORED).nonzero()[:, 0]
    if not len(positions_N):
        raise UserError(
            "A batch has no supervised token: there is nothing to learn from it.",
            where=f"tasks {inputs.get('tasks', [])}",
            fix="Look at the data: every sample needs a non-empty answer.",
        )
    states_BSD, head = run_body(model, {name: value for name, value in inputs.items() if name != "labels"})
    targets_N = targets_BS.flatten().index_select(0, positions_N)
    positions_N, targets_N = (tensor.to(states_BSD.device, non_blocking=True) for tensor in (positions_N, targets_N))
    return states_BSD.flatten(0, 1).index_select(0, positions_N), targets_N, head
