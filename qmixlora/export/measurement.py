"""Measurements of a model on some rows: answers, loss and updates.

Shapes: N instances of a batch, L layers, E = F factors in a pool, M supervised tokens, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from qmixlora.data import IGNORED, Conversation
from qmixlora.evaluation import answer_rows, score
from qmixlora.loss import supervised_logits, supervised_loss
from qmixlora.mixlora.routing_record import RoutingStatistics
from qmixlora.progress import progress
from qmixlora.session import Session, TunedSession

from .low_rank import mixed, squared_norms
from .static import Learned, StaticAdapter


@dataclass(frozen=True)
class Measurement:
    """A model on some rows: mean score over their tasks, by the `metrics` of these; loss per supervised token, every
    answer.
    """

    score: float
    loss: float
    answers: list[str]
    metrics: Mapping[str, str]

    def agreement(self, other: Measurement) -> float:
        """The share of rows that both answer with the same words, greedily."""
        same = [a == b for a, b in zip(self.answers, other.answers, strict=True)]
        return sum(same) / len(same)


@dataclass(frozen=True)
class LiveUpdates:
    """The live model's updates over some rows: their mean mixing matrices and, by layer, `E ||dW(x)||^2`."""

    mix_LEF: Tensor
    squares: dict[str, float]

    def errors(self, learned: Learned, adapter: StaticAdapter) -> dict[str, float]:
        """`E ||dW(x) - M||^2 / E ||dW(x)||^2` of every layer, where M is the adapter's update.

        dW is linear in the mixing matrix, so that `E ||dW - M||^2 = E ||dW||^2 - 2 <E dW, M> + ||M||^2`, all of it in
        E x E. 0 is exact, 1 as good as no update; more than 1 is possible.
        """
        errors = {}
        for mix_EF, (layer, pools) in zip(self.mix_LEF, learned.pools.items(), strict=True):
            update = adapter.updates[layer]
            mean = mixed(*pools, learned.scaling, mix_EF)
            difference = self.squares[layer] - 2 * float(mean.inner(update)) + float(update.inner(update))
            errors[layer] = max(difference, 0.0) / self.squares[layer] if self.squares[layer] > 0 else 0.0
        return errors


def measure(session: Session, rows: Sequence[Conversation]) -> Measurement:
    """Measure any session (a run, an exported LoRA, a merged checkpoint) by real generation and by its loss."""
    with progress("answers") as tell:
        answers = answer_rows(session, rows, on_progress=lambda done: tell(done, len(rows)))
    totals, counts, _ = zip(*_losses(session, rows), strict=True)
    scores = score(rows, answers, "held out", session.recipe.data)
    metrics = {task: own.metric for task, own in scores.tasks.items()}
    return Measurement(scores.mean, sum(totals) / sum(counts), answers, metrics)


def measure_updates(session: TunedSession, learned: Learned, rows: Sequence[Conversation]) -> LiveUpdates:
    """The live model's updates over some rows."""
    if not learned.is_mixture:  # one update for all inputs
        mix_LEF = learned.identity()
        updates = learned.adapter(mix_LEF).updates
        return LiveUpdates(mix_LEF, {layer: float(u.inner(u)) for layer, u in updates.items()})
    statistics = RoutingStatistics(session.model, ["rows"])
    squares = dict.fromkeys(learned.pools, 0.0)
    for _, _, count in _losses(session, rows):
        statistics.add(["rows"] * count)
        selection_LNEF = statistics.tuner.last_selection().cpu()
        for (layer, pools), mix_NEF in zip(learned.pools.items(), selection_LNEF, strict=True):
            squares[layer] += float(squared_norms(*pools, learned.scaling, mix_NEF).sum())
    means, count_T = statistics.take()
    mean_squares = {layer: total / float(count_T) for layer, total in squares.items()}
    return LiveUpdates(torch.cat(list(means.values())), mean_squares)


def supervised_outputs(session: Session, rows: Sequence[Conversation]) -> Tensor:
    """The logits of supervised tokens (M x V, fp32, on the CPU), to compare two models."""
    with torch.no_grad(), session.evaluating():
        logits_MV = supervised_logits(session.model, session.on_device(session.collator(rows)))
    return logits_MV.float().cpu()


def _losses(session: Session, rows: Sequence[Conversation]) -> Iterator[tuple[float, int, int]]:
    """(summed loss, supervised tokens, rows) of every batch, in evaluation mode."""
    with torch.no_grad(), session.evaluating():
        for batch in session.batches(rows):
            inputs = session.on_device(session.collator(batch))
            supervised = int((inputs["labels"][:, 1:] != IGNORED).sum())
            yield float(supervised_loss(session.model, inputs, 1)), supervised, len(batch)
