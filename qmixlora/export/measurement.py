"""What an export loses: answers, loss and updates, compared with the live model on samples that it was not trained on.

Shapes: B batch, L layers, E = F factors in a pool, N supervised tokens, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from qmixlora.data import IGNORED
from qmixlora.evaluation.answers import answer_rows, evaluating, on_device, score
from qmixlora.loss import supervised_logits, supervised_loss
from qmixlora.mixlora.routing_record import RoutingStatistics
from qmixlora.session import Session

from .low_rank import mixed, squared_norms
from .static import Learned, StaticAdapter

Rows = Sequence[Mapping[str, Any]]


@dataclass(frozen=True)
class Reading:
    """How one model does on some rows: mean exact match over their tasks, loss per supervised token, every answer."""

    exact_match: float
    loss: float
    answers: list[str]

    def agreement(self, other: Reading) -> float:
        """The share of rows that both answer with the same words, greedily."""
        same = [a == b for a, b in zip(self.answers, other.answers, strict=True)]
        return sum(same) / len(same)


@dataclass(frozen=True)
class LiveUpdates:
    """The live model's updates over some rows: their mean mixing matrices and, by layer, `E ||dW(x)||^2`."""

    mix_LEF: Tensor
    squares: dict[str, float]

    def errors(self, run: Learned, adapter: StaticAdapter) -> dict[str, float]:
        """`E ||dW(x) - M||^2 / E ||dW(x)||^2` of every layer, where M is the adapter's update.

        dW is linear in the mixing matrix, so that `E ||dW - M||^2 = E ||dW||^2 - 2 <E dW, M> + ||M||^2`, all of it in
        E x E. 0 is exact, 1 as good as no update; more than 1 is possible.
        """
        found = {}
        for mix_EF, (layer, pools) in zip(self.mix_LEF, run.pools.items(), strict=True):
            update = adapter.updates[layer]
            mean = mixed(*pools, run.scaling, mix_EF)
            difference = self.squares[layer] - 2 * float(mean.inner(update)) + float(update.inner(update))
            found[layer] = max(difference, 0.0) / self.squares[layer] if self.squares[layer] > 0 else 0.0
        return found


def measure(session: Session, rows: Rows) -> Reading:
    """Answers by real generation, and the loss, of any session (a run, an exported LoRA, a merged checkpoint)."""
    spec = session.recipe.train
    answers = answer_rows(
        session.model, session.collator, rows, batch_size=spec.eval_batch_size, max_new_tokens=spec.max_new_tokens
    )
    totals, counts, _ = zip(*_losses(session, rows), strict=True)
    loss = sum(totals) / sum(counts)
    return Reading(score(rows, answers, "held out")["mean_exact_match"], loss, answers)


def measure_live(session: Session, run: Learned, rows: Rows) -> tuple[Reading, LiveUpdates]:
    """The same of the live model, with its updates over these rows."""
    reading = measure(session, rows)
    if not run.is_mixture:  # one update for all inputs
        mix_LEF = run.identity()
        updates = run.adapter(mix_LEF).updates
        return reading, LiveUpdates(mix_LEF, {layer: float(u.inner(u)) for layer, u in updates.items()})
    statistics = RoutingStatistics(session.model, ["rows"])
    squares = dict.fromkeys(run.pools, 0.0)
    for _, _, count in _losses(session, rows):
        statistics.add(["rows"] * count)
        for (layer, pools), mix_BEF in zip(run.pools.items(), statistics.mixes().cpu(), strict=True):
            squares[layer] += float(squared_norms(*pools, run.scaling, mix_BEF).sum()) / len(rows)
    means, _ = statistics.take()
    return reading, LiveUpdates(torch.cat(list(means.values())), squares)


def supervised_outputs(session: Session, rows: Rows) -> Tensor:
    """The logits of supervised tokens (N x V, fp32, on the CPU), to hold two models against each other."""
    with torch.no_grad(), evaluating(session.model):
        logits_NV = supervised_logits(session.model, on_device(session.collator(rows), session.device))
    return logits_NV.float().cpu()


def _losses(session: Session, rows: Rows) -> Any:
    """(summed loss, supervised tokens, rows) of every batch, in evaluation mode."""
    size = session.recipe.train.eval_batch_size
    with torch.no_grad(), evaluating(session.model):
        for start in range(0, len(rows), size):
            batch = [rows[index] for index in range(start, min(start + size, len(rows)))]
            inputs = on_device(session.collator(batch), session.device)
            supervised = int((inputs["labels"][:, 1:] != IGNORED).sum())
            yield float(supervised_loss(session.model, inputs, 1)), supervised, len(batch)
