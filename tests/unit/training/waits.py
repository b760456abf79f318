"""A micro-batch of the real Trainer on the pretended card, with the host's waits by phase."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any
from unittest.mock import patch

from qmixlora.backbone.levers import HostEmbedding
from qmixlora.mixlora.routing_record import RoutingStatistics
from qmixlora.recipe import Recipe
from qmixlora.session import TunedSession, open_session
from qmixlora.training import SupervisedTrainer, make_trainer
from qmixlora.training.callbacks import ProgressDisplay
from tests.pretended_cuda import CUDA, PretendedCuda, put_model

from .helpers import QUIET


def waits_of(recipe: Recipe, rows: Sequence[Any], folder: Path) -> PretendedCuda:
    """The waits of the second of a step's two micro-batches, each of half the rows.

    The phases are `batch` (to the card), `forward` (of the model), `between` (everything from its last hidden states
    to the loss, and the counts of routing), `backward` and `after`.
    """
    tasks = sorted({row["task"] for row in rows})
    session, cuda = open_session(recipe, tasks), PretendedCuda()
    trainer = make_trainer(session, rows, None, folder, ProgressDisplay(QUIET))
    trainer.state.max_steps = 1
    _put(session)
    _name_phases(session, trainer, cuda)
    with patch.object(type(trainer.args), "device", CUDA), cuda.pretended():
        if recipe.adapter.method == "mixlora":
            RoutingStatistics(session.model, tasks).watch()
        half = len(rows) // 2
        collated = iter([session.collator(rows[:half]), session.collator(rows[half:])])
        batches, tokens = trainer.get_batch_samples(collated, 2, CUDA)
        for batch in batches:
            cuda.waits.clear()
            cuda.phase = "batch"
            trainer.training_step(session.model, batch, tokens)
    return cuda


def _put(session: TunedSession) -> None:
    put_model(session.model)
    for module in session.model.modules():
        if isinstance(module, HostEmbedding):
            module.device = CUDA


def _name_phases(session: TunedSession, trainer: SupervisedTrainer, cuda: PretendedCuda) -> None:
    backward = trainer.accelerator.backward

    def enter(phase: str) -> Callable[..., None]:
        return lambda *_: setattr(cuda, "phase", phase)

    def watched(*args: Any, **kwargs: Any) -> None:
        cuda.phase = "backward"
        backward(*args, **kwargs)
        cuda.phase = "after"

    trainer.accelerator.backward = watched
    session.model.register_forward_pre_hook(enter("forward"), prepend=True)
    session.model.register_forward_hook(enter("between"), prepend=True)
