"""The fidelity of an export, `fidelity.json`: its make-up, and its losses against the live model."""

from __future__ import annotations

import importlib.metadata
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from .measurement import Measurement

FIDELITY = "fidelity.json"
TOLERATED = 0.95  # of the live score; an export below it is warned of
LIBRARIES = ("torch", "transformers", "peft", "bitsandbytes")
WHOLE_MODULES = (
    "The projector is in the adapter as a whole (modules_to_save). Servers that refuse that, such as vLLM, take "
    "--projector-rank K, or a run trained with adapter.projector=lora."
)


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
    (`lora`, `merged`), the last one of the folder's own contents. `kept` are shares that cuts keep of a squared norm;
    `update_error` is `E ||dW(x) - M||^2 / E ||dW||^2`. `polish_steps` are those of the adapter itself, `polish_tried`
    those that were made; where they were thrown away the mean stands. `decided_on` names the rows on which that was
    decided (None: nothing was to decide).
    """

    folder: Path
    run: Path
    tasks: Mapping[str, float]
    split: str
    samples: int
    rank: int
    polish_steps: int
    polish_tried: int
    decided_on: str | None
    kept: Mapping[str, ByLayer]
    update_error: ByLayer
    live: Measurement
    measurements: Mapping[str, Measurement]
    merging: Merging | None = None
    notes: tuple[str, ...] = ()
    versions: Mapping[str, str] = field(
        default_factory=lambda: {name: importlib.metadata.version(name) for name in LIBRARIES}
    )

    @property
    def form(self) -> str:
        """`lora` or `merged`."""
        return list(self.measurements)[-1]

    @property
    def score(self) -> float:
        """The exact match of the export itself."""
        return self.measurements[self.form].exact_match

    @property
    def warnings(self) -> list[str]:
        """A warning of a large loss, with its numbers and a remedy; none where the loss is small."""
        live = self.live.exact_match
        if self.score >= TOLERATED * live:
            return []
        from_original = self.merging is not None and self.merging.base == "original"
        if from_original and self.measurements["lora"].exact_match >= TOLERATED * live:
            advice = "merge into the weights that training saw (--base nf4)."
        else:
            longer = f"polish it longer (--polish {2 * self.polish_tried})"
            more = longer if self.polish_tried else "polish it (--polish 200)"
            advice = f"{more}, or train with adapter.task_mix=0.3 or adapter.route_on=task."
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
            "held_out": self.split != "train",
            "samples": self.samples,
            "rank": self.rank,
            "polish_steps": self.polish_steps,
            "polish_tried": self.polish_tried,
            "decided_on": self.decided_on,
            "kept": {name: by_layer.to_dict() for name, by_layer in self.kept.items()},
            "update_error": self.update_error.to_dict(),
            **(merging or {}),
            "notes": list(self.notes),
            "exact_match": {name: one.exact_match for name, one in everything.items()},
            "loss": {name: one.loss for name, one in everything.items()},
            "agreement": {name: one.agreement(self.live) for name, one in self.measurements.items()},
            "warnings": self.warnings,
            "versions": dict(self.versions),
        }


def write_card(folder: Path, fidelity: Fidelity) -> None:
    """Describe an adapter in its `README.md`, under the metadata that PEFT wrote, in place of PEFT's empty form."""
    _, metadata, _ = (folder / "README.md").read_text(encoding="utf-8").split("---", maxsplit=2)
    shares = ", ".join(f"{task} ({share:.2f})" if share < 1 else task for task, share in fidelity.tasks.items())
    live, own = fidelity.live, fidelity.measurements["lora"]
    text = f"""---{metadata}---

# LoRA for {shares}

Exported by qmixlora from a run that was tuned on several tasks: rank {fidelity.rank}, polished for \
{fidelity.polish_steps} steps. It needs `peft` and `transformers` alone:

```python
from peft import PeftModel
from transformers import AutoModelForImageTextToText

model = PeftModel.from_pretrained(AutoModelForImageTextToText.from_pretrained(BASE), THIS_FOLDER)
```

On {fidelity.samples} samples (split {fidelity.split}), over the NF4 base that it was trained on:

| | exact match | loss |
|---|---|---|
| the run itself | {live.exact_match:.3f} | {live.loss:.3f} |
| this adapter | {own.exact_match:.3f} | {own.loss:.3f} |

`{FIDELITY}` has the rest.
"""
    (folder / "README.md").write_text(text, encoding="utf-8")
