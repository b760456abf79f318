"""Will it fit: the peak of a run's training step, where it goes, and what to change."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from qmixlora.recipe import Recipe

from .architectures import config_of
from .cards import GIB
from .simulation.batch import Batch, synthetic_batch
from .simulation.step import GAPS, Step, simulate

CONTEXT = GIB // 2  # what a CUDA process holds beside its tensors; assumed, not measured
WORKSPACES = int(2 * 8.125 * 2**20)  # cuBLAS: one of ":4096:2:16:8" KiB for the forward and for the backward thread
BESIDE = "CUDA context and workspaces (assumed)"
MISSED = "missed by plans before (probe)"
MARGIN = 0.08  # of the card: what a plan leaves free


@dataclass(frozen=True)
class Plan:
    """Bytes on the card at the peak of a training step, by part; `place` is the stretch of the step and the operation.

    `host` is what lies in host memory meanwhile, by part, beside Python's own memory; `loading` the peak of loading, on
    the card (with the CUDA context) and on the host.
    """

    parts: dict[str, int]
    place: str
    host: dict[str, int]
    loading: dict[str, int]
    batch: Batch
    card: int | None

    @property
    def peak(self) -> int:
        return sum(self.parts.values())

    @property
    def tensors(self) -> int:
        """The peak of tensors alone."""
        return self.peak - sum(self.parts.get(name, 0) for name in (BESIDE, GAPS, MISSED))

    @property
    def fits(self) -> bool | None:
        """Whether training and loading leave the margin of the card free; None without a card."""
        return None if self.card is None else max(self.peak, self.loading["card"]) <= (1 - MARGIN) * self.card

    def to_dict(self) -> dict[str, Any]:
        """What `qmixlora plan --json` prints, sizes in GiB."""
        card = None if self.card is None else self.card / GIB
        return {
            "peak_gib": self.peak / GIB,
            "card_gib": card,
            "margin_gib": None if card is None else card - self.peak / GIB,
            "fits": self.fits,
            "parts": {name: size / GIB for name, size in self.parts.items()},
            "place": self.place,
            "host": {name: size / GIB for name, size in self.host.items()},
            "loading": {name: size / GIB for name, size in self.loading.items()},
            "batch": self.batch.to_dict(),
        }


def plan(
    recipe: Recipe,
    *,
    card: int | None = None,
    tokens: int | None = None,
    batch: Batch | None = None,
    residual: int = 0,
) -> Plan:
    """Plan a recipe without weights and without a GPU, by its own training step.

    The batch is `batch`, or one of samples of `tokens` (default `data.max_length`), pictures included. `card` is in
    bytes, as `residual`: what plans of this model are known to miss.

    Raises:
        UserError: the model's configuration cannot be read, its pictures cannot be planned, or do not fit in `tokens`;
            or as `arrange`.
    """
    config = config_of(recipe.model)
    batch = batch or synthetic_batch(config, recipe, tokens or recipe.data.max_length)
    step = simulate(recipe, config, batch)
    saved = step.sizes["activations saved"]
    stretch = max(step.peaks, key=lambda name: step.peaks[name])
    beyond, place = step.peaks[stretch], f"{stretch} ({step.places[stretch]})"
    states, own_step = _optimizer(recipe, step)
    if own_step > beyond:
        beyond, place = own_step, "optimizer step"
    parts = {
        **step.held,
        "optimizer": states,
        "activations saved": min(saved, beyond),
        "gradients and transients": beyond - min(saved, beyond),
        GAPS: step.sizes[GAPS],
        BESIDE: CONTEXT + WORKSPACES,
    }
    if residual:
        parts[MISSED] = residual
    loading = {"card": step.sizes["loading, card"] + CONTEXT, "host": step.sizes["loading, host"]}
    return Plan(parts, place, {name: size for name, size in step.host.items() if size}, loading, batch, card)


def _optimizer(recipe: Recipe, step: Step) -> tuple[int, int]:
    """(bytes of its states, the most that its own step holds beyond what is held all along).

    torch's AdamW works on lists of tensors and holds as much again as is trained; bitsandbytes' goes tensor by tensor.
    """
    gradients, trainable = step.sizes["gradients to come"], step.sizes["trainable"]
    if recipe.train.optimizer == "adamw":
        return step.sizes["32-bit states"], gradients + trainable
    return step.sizes["8-bit states"], gradients
