"""What NF4 would do to a model, measured on its own weights and, where there is data, on some samples."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from qmixlora.backbone.damage import KindError, nf4_damage
from qmixlora.data import load_conversations
from qmixlora.recipe import Data, Model, Recipe
from qmixlora.session import NO_DATA, Session, with_whole_model


def measure_nf4(spec: Model, data: str | None, samples: int) -> list[KindError]:
    """Load the model without quantisation and compare its layers with what NF4 makes of them, on the first samples of
    `data` where it is given.

    Raises:
        UserError: as `with_whole_model` and `load_conversations`.
    """
    recipe = Recipe(model=spec.model_copy(update={"quantization": "none"}), data=Data(train=data) if data else NO_DATA)
    rows = load_conversations(data) if data else []
    chosen = [rows[index] for index in range(min(samples, len(rows)))]

    def measured(session: Session) -> list[KindError]:
        def run() -> None:
            with torch.no_grad():
                for row in chosen:
                    batch = session.on_device(session.collator.prompts([row]))
                    session.backbone(**batch, use_cache=False)

        return nf4_damage(session.backbone, session.anatomy, run if data else None)

    return with_whole_model(recipe, measured)


def damage_lines(kinds: Sequence[KindError], most: float) -> list[str]:
    """A table for people, and what to write into a recipe that keeps the kinds with an error over `most`."""
    lines = [f"{'kind of layer':36} layers  share  weights  worst  outputs"]
    for kind in kinds:
        outputs = "" if kind.outputs is None else f"{kind.outputs:.1%}"
        lines.append(
            f"{kind.kind:36} {kind.layers:6} {kind.share:6.1%} {kind.weights:8.1%} {kind.worst:6.1%} {outputs:>8}"
        )
    over = [kind.kind for kind in kinds if max(kind.worst, kind.outputs or 0) > most]
    if over:
        lines.append(f"Over {most:.0%}: model.keep: [{', '.join(over)}] holds these in 16 bits.")
    else:
        lines.append(f"No kind of layer is over {most:.0%}.")
    return lines
