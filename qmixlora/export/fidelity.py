"""The fidelity of an export, `fidelity.json`: its make-up, and its losses against the live model."""

from __future__ import annotations

import importlib.metadata
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from qmixlora.serving.files.places import vllm_rank

from .measurement import Measurement

FIDELITY = "fidelity.json"
TOLERATED = 0.95  # of the live score; an export below it is warned of
LIBRARIES = ("torch", "transformers", "peft", "bitsandbytes")
WHOLE_MODULES = (
    "The projector is in the adapter as a whole (modules_to_save): vLLM refuses that, llama.cpp leaves the projector "
    "out in silence, and PEFT neither adds such adapters nor mixes them in a batch. --projector base has none of this."
)
LOW_RANK = (
    "The projector is in the adapter as low-rank factors: vLLM leaves that half out unless it is started with "
    "--enable-tower-connector-lora, which not every model bears (LLaVA with CLIP: name the language model's layers and "
    "linear_1 linear_2 in --lora-target-modules). --projector base has none of this, and loses nothing."
)
LIMITED = (
    "The run held images to data.max_image_tokens={limit}, and these adapters lie on a model that does not: limit "
    "images where you serve them too (vLLM: --mm-processor-kwargs)."
)
TALL = "The rank is over 16, the most that vLLM takes by default: start it with --max-lora-rank {rank}."
BY_DEFAULT = 16


@dataclass(frozen=True)
class ByLayer:
    """A number per layer."""

    layers: Mapping[str, float]

    @property
    def mean(self) -> float:
        return sum(self.layers.values()) / max(len(self.layers), 1)

    def to_dict(self) -> dict[str, Any]:
        """The numbers, with their mean over layers."""
        return {"mean": self.mean, "layers": dict(self.layers)}


@dataclass(frozen=True)
class Merging:
    """The base of a merged checkpoint (`original` or `nf4`), and how far its logits are from its adapter's, relative
    to their size.
    """

    base: str
    logits_difference: float


@dataclass(frozen=True)
class Fidelity:
    """The fidelity of one export.

    `tasks` are the shares of the tasks in it; `split` names the rows of `live` and `measurements`, which are by form
    (`lora`, `merged`, `gguf`), the last one of the folder's own contents; tasks that are `unmeasured` have none.
    `kept` are shares that cuts keep of a squared norm; `update_error` is `E ||dW(x) - M||^2 / E ||dW||^2`.
    `polish_steps` are those of the adapter itself, `polish_tried` those that were made; where they were thrown away the
    mean stands. `decided_on` names the rows on which that was decided (None: nothing was to decide). `projector` says
    where the trained projector is: in the adapter's own base (`base`), whole in the adapter (`adapter`), in it as
    low-rank factors; None if none was trained. `in_nf4`: the run, and its adapters, were measured on a backbone in NF4.
    """

    folder: Path
    run: Path
    tasks: Mapping[str, float]
    split: str
    unmeasured: Sequence[str]
    samples: int
    rank: int
    polish_steps: int
    polish_tried: int
    decided_on: str | None
    kept: Mapping[str, ByLayer]
    update_error: ByLayer
    live: Measurement
    measurements: Mapping[str, Measurement]
    projector: str | None
    in_nf4: bool
    merging: Merging | None = None
    notes: tuple[str, ...] = ()
    versions: Mapping[str, str] = field(
        default_factory=lambda: {name: importlib.metadata.version(name) for name in LIBRARIES}
    )

    @property
    def form(self) -> str:
        """`lora`, `merged` or `gguf`."""
        return list(self.measurements)[-1]

    @property
    def score(self) -> float:
        """The score of the export itself."""
        return self.measurements[self.form].score

    @property
    def metrics(self) -> str:
        """The metrics that the scores are by, as recipes name them."""
        return ", ".join(sorted(set(self.live.metrics.values())))

    @property
    def warnings(self) -> list[str]:
        """A warning of tasks that were not measured, and of a large loss, with its numbers; each with a remedy."""
        return [*self._of_unmeasured(), *self._of_a_loss()]

    def _of_unmeasured(self) -> list[str]:
        if not self.unmeasured:
            return []
        tasks = ", ".join(self.unmeasured)
        told = f"{self.folder.name} was measured without {tasks}: the split {self.split} has no sample of it"
        return [f"{told}. Put some into data.{self.split}."]

    def _of_a_loss(self) -> list[str]:
        live = self.live.score
        if self.score >= TOLERATED * live:
            return []
        from_original = self.merging is not None and self.merging.base == "original"
        if from_original and self.measurements["lora"].score >= TOLERATED * live:
            advice = "merge into the weights that training saw (--base nf4)."
        else:
            longer = f"polish it longer (--polish {2 * self.polish_tried})"
            more = longer if self.polish_tried else "polish it (--polish 200)"
            otherwise = "train with adapter.task_mix=0.3 or adapter.route_on=task"
            apart = "export each task by itself, among which qmixlora pick chooses"
            advice = f"{more}, or {apart if len(self.tasks) > 1 else otherwise}."
        scores = f"{self.folder.name} scores {self.score:.3f}, the live model {live:.3f} (split {self.split})"
        return [f"{scores}: {advice}"]

    def to_dict(self) -> dict[str, Any]:
        """The contents of `fidelity.json`."""
        everything = {"live": self.live, **self.measurements}
        merging = self.merging and {"base": self.merging.base, "logits_difference": self.merging.logits_difference}
        return {
            "form": self.form,
            "folder": str(self.folder),
            "run": str(self.run),
            "tasks": dict(self.tasks),
            "split": self.split,
            "unmeasured": list(self.unmeasured),
            "held_out": self.split != "train",
            "samples": self.samples,
            "rank": self.rank,
            "projector": self.projector,
            "polish_steps": self.polish_steps,
            "polish_tried": self.polish_tried,
            "decided_on": self.decided_on,
            "kept": {name: by_layer.to_dict() for name, by_layer in self.kept.items()},
            "update_error": self.update_error.to_dict(),
            **(merging or {}),
            "notes": list(self.notes),
            "exact_match": {name: one.score for name, one in everything.items()},
            "metrics": dict(self.live.metrics),
            "loss": {name: one.loss for name, one in everything.items()},
            "agreement": {name: one.agreement(self.live) for name, one in self.measurements.items()},
            "warnings": self.warnings,
            "versions": dict(self.versions),
        }


def notes_on(projector: str | None, rank: int) -> tuple[str, ...]:
    """What servers make of an adapter of this rank, with its trained projector in this place (None: there is none)."""
    of_projector = {"adapter": WHOLE_MODULES, "low-rank": LOW_RANK}
    notes = [of_projector[projector]] if projector in of_projector else []
    if rank > BY_DEFAULT:
        notes.append(TALL.format(rank=vllm_rank(rank)))
    return tuple(notes)
