"""`fidelity.json`: what an export is, and what it loses."""

from __future__ import annotations

import importlib.metadata
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from .measurement import Reading

FIDELITY = "fidelity.json"
TOLERATED = 0.95  # of the live score; a mean below it is polished, and an export below it is warned of
LIBRARIES = ("torch", "transformers", "peft", "bitsandbytes")
WHOLE_MODULES = (
    "The projector is in the adapter as a whole (modules_to_save). Servers that refuse that, such as vLLM, take "
    "--projector-rank K, or a run trained with adapter.train_projector=false."
)


def report(facts: Mapping[str, Any], form: str, folder: Path, live: Reading, **others: Reading) -> dict[str, Any]:
    """The contents of `fidelity.json`: the facts of an export, `form` (`lora` or `merged`), and for the live model and
    each of the others `exact_match` and `loss`, with the share of answers that `agree` with the live model's.

    The last of the others is what lies in the folder; `warnings` are about it.
    """
    readings = {"live": live, **others}
    found = {
        "form": form,
        "folder": str(folder),
        **facts,
        "exact_match": {name: reading.exact_match for name, reading in readings.items()},
        "loss": {name: reading.loss for name, reading in readings.items()},
        "agreement": {name: reading.agreement(live) for name, reading in others.items()},
    }
    found["warnings"] = _warnings(found)
    found["versions"] = {name: importlib.metadata.version(name) for name in LIBRARIES}
    return found


def write_card(folder: Path, made: Mapping[str, Any]) -> None:
    """Put into `README.md`, under the metadata that PEFT wrote, what this adapter is in place of PEFT's empty form."""
    _, metadata, _ = (folder / "README.md").read_text(encoding="utf-8").split("---", maxsplit=2)
    shares = ", ".join(f"{task} ({share:.2f})" if share < 1 else task for task, share in made["tasks"].items())
    scores, losses = made["exact_match"], made["loss"]
    text = f"""---{metadata}---

# LoRA for {shares}

Exported by qmixlora from a run that was tuned on several tasks: rank {made["rank"]}, polished for \
{made["polish_steps"]} steps. It needs `peft` and `transformers` alone:

```python
from peft import PeftModel
from transformers import AutoModelForImageTextToText

model = PeftModel.from_pretrained(AutoModelForImageTextToText.from_pretrained(BASE), THIS_FOLDER)
```

On {made["samples"]} samples (split {made["split"]}), over the NF4 base that it was trained on:

| | exact match | loss |
|---|---|---|
| the run itself | {scores["live"]:.3f} | {losses["live"]:.3f} |
| this adapter | {scores["lora"]:.3f} | {losses["lora"]:.3f} |

`{FIDELITY}` has the rest.
"""
    (folder / "README.md").write_text(text, encoding="utf-8")


def by_layer(values: Mapping[str, float]) -> dict[str, Any]:
    """A number per layer, with the mean over layers."""
    return {"mean": sum(values.values()) / max(len(values), 1), "layers": dict(values)}


def _warnings(found: Mapping[str, Any]) -> list[str]:
    """A large loss, with its numbers and what to do about it."""
    scores = found["exact_match"]
    live, score = scores["live"], list(scores.values())[-1]
    if score >= TOLERATED * live:
        return []
    if found["form"] == "merged" and found["base"] == "original" and scores["lora"] >= TOLERATED * live:
        advice = "merge into the weights that training saw (--base nf4)."
    else:
        steps = found["polish_steps"]
        more = f"polish it longer (--polish {2 * steps})" if steps else "polish it (--polish 200)"
        advice = f"{more}, or train with adapter.task_mix=0.3 or adapter.route_on=task."
    name = Path(found["folder"]).name
    return [f"{name} scores {score:.3f}, the live model {live:.3f} (split {found['split']}): {advice}"]
