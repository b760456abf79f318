"""The planner: the peak of a run's training step, by part, and whether it fits a card."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from qmixlora.device import GIB
from qmixlora.recipe import Recipe

from .architectures import config_of
from .cards import CONTEXT
from .simulation.account import Peak
from .simulation.batch import Batch, synthetic_batch
from .simulation.step import Sizes, simulate

WORKSPACES = int(2 * 8.125 * 2**20)  # cuBLAS: one of ":4096:2:16:8" KiB for the forward and for the backward thread
MARGIN = 0.08  # of the card: a plan leaves it free


@dataclass(frozen=True)
class CardParts:
    """Bytes on the card at the peak of a training step. `gradients` are those of earlier micro-batches; `missed` are
    the bytes that probes have found missing in plans of this model, `routing_sums` those of the routing record.
    """

    nf4_weights: int
    kept_out_weights: int
    adapter: int
    routers: int
    projector: int
    gradients: int
    optimizer: int
    routing_sums: int
    activations_saved: int
    transients: int
    gaps: int
    context: int
    missed: int


@dataclass(frozen=True)
class HostParts:
    """Bytes in host memory during a training step, beside Python's own."""

    streamed_layers: int
    embeddings: int
    activations: int


@dataclass(frozen=True)
class Loading:
    """Bytes at the peak of loading: on the card, the CUDA context included, and in host memory."""

    card: int
    host: int


LABELS = {  # for people, and in JSON; other parts are called by their names
    "nf4_weights": "NF4 weights",
    "kept_out_weights": "kept-out weights",
    "routing_sums": "routing record",
    "activations_saved": "activations saved",
    "transients": "gradients and transients",
    "gaps": "allocator's gaps",
    "context": "CUDA context and workspaces (assumed)",
    "missed": "missed by plans before (probe)",
    "streamed_layers": "streamed layers",
}
# parts that most plans do not have
UNLESS_ZERO = {"missed", "routing_sums", "streamed_layers", "embeddings", "activations"}


@dataclass(frozen=True)
class Plan:
    """The memory of a recipe's training step on one batch. `place` is the phase and the operation of the peak; `phases`
    the bytes on the card at the peak of every phase of the step; `card` the memory of the card in bytes, if one was
    named.
    """

    parts: CardParts
    place: str
    phases: Mapping[str, int]
    host: HostParts
    loading: Loading
    batch: Batch
    card: int | None
    paged: int  # bytes of the optimiser's states that lie outside torch's allocator

    @property
    def peak(self) -> int:
        """Bytes on the card."""
        return sum(asdict(self.parts).values())

    @property
    def tensors(self) -> int:
        """The peak of tensors alone."""
        return self.peak - self.parts.context - self.parts.gaps - self.parts.missed

    @property
    def peak_with_loading(self) -> int:
        """The most bytes on the card, in training or before it."""
        return max(self.peak, self.loading.card)

    @property
    def fits(self) -> bool | None:
        """Whether training and loading leave the margin of the card free; None without a card."""
        return None if self.card is None else self.peak_with_loading <= room_on(self.card)

    def to_dict(self) -> dict[str, Any]:
        """The plan in the JSON of `qmixlora plan`, sizes in GiB."""
        card = None if self.card is None else self.card / GIB
        return {
            "peak_gib": self.peak / GIB,
            "card_gib": card,
            "margin_gib": None if card is None else card - self.peak / GIB,
            "fits": self.fits,
            "parts": _labelled(asdict(self.parts)),
            "place": self.place,
            "host": _labelled(asdict(self.host)),
            "loading": _labelled(asdict(self.loading)),
            "batch": self.batch.to_dict(),
        }


def room_on(card: int) -> int:
    """The bytes of a card that a plan may take."""
    return int((1 - MARGIN) * card)


def plan(
    recipe: Recipe,
    *,
    card: int | None = None,
    tokens: int | None = None,
    batch: Batch | None = None,
    residual: int = 0,
) -> Plan:
    """Plan a recipe without weights and without a GPU, by its own training step.

    The batch is `batch`, or one of samples of `tokens` (default `data.max_length`), images included. `card` is in
    bytes, as `residual`: the bytes that plans of this model are known to miss.

    Raises:
        UserError: the model's configuration cannot be read, its images cannot be planned, or do not fit in `tokens`;
            or as `apply_levers`.
    """
    config = config_of(recipe.model)
    batch = batch or synthetic_batch(config, recipe, tokens or recipe.data.max_length)
    step = simulate(recipe, config, batch)
    sizes = step.sizes
    states, own_step = optimizer_states(recipe, sizes)
    peaks = {**step.peaks, "optimizer step": Peak(own_step, "")}
    phase, (beyond, operation) = max(peaks.items(), key=lambda item: item[1].size)
    saved = min(sizes.activations_saved, beyond)
    parts = CardParts(
        nf4_weights=sizes.nf4_weights,
        kept_out_weights=sizes.kept_out_weights,
        adapter=sizes.adapter,
        routers=sizes.routers,
        projector=sizes.projector,
        gradients=sizes.gradients,
        optimizer=states,
        routing_sums=sizes.routing_sums * batch.tasks,
        activations_saved=saved,
        transients=beyond - saved,
        gaps=step.gaps,
        context=CONTEXT + WORKSPACES,
        missed=residual,
    )
    host = HostParts(sizes.host_streamed, sizes.host_embeddings, sizes.host_activations)
    loading = Loading(sizes.loading_card + CONTEXT, sizes.loading_host)
    paged = sizes.states_paged if recipe.train.optimizer.startswith("paged") else 0
    held = sum(asdict(parts).values()) - beyond
    phases = {name: held + peak.size for name, peak in peaks.items()}
    place = f"{phase} ({operation})" if operation else phase
    return Plan(parts, place, phases, host, loading, batch, card, paged)


def optimizer_states(recipe: Recipe, sizes: Sizes) -> tuple[int, int]:
    """The optimiser's memory: (bytes of its states, the most that its own step takes beyond everything held all along).

    torch's AdamW works on lists of tensors and holds as much again as is trained; bitsandbytes' goes tensor by tensor.
    """
    if recipe.train.optimizer == "adamw":
        return sizes.states_32_bit, sizes.gradients_to_come + sizes.trainable
    return sizes.states_8_bit, sizes.gradients_to_come


def _labelled(sizes: Mapping[str, int]) -> dict[str, float]:
    """Sizes in GiB by their labels."""
    return {LABELS.get(name, name): size / GIB for name, size in sizes.items() if size or name not in UNLESS_ZERO}
