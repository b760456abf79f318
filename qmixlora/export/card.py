"""The card of an exported adapter, `README.md`: what it is, and how stock libraries load it."""

from __future__ import annotations

from pathlib import Path

from qmixlora.bases import Source

from .fidelity import FIDELITY, Fidelity


def write_card(folder: Path, fidelity: Fidelity, base: Source) -> None:
    """Describe an adapter on `base` under the metadata that PEFT wrote, in place of PEFT's empty form."""
    _, metadata, _ = (folder / "README.md").read_text(encoding="utf-8").split("---", maxsplit=2)
    shares = ", ".join(f"{task} ({share:.2f})" if share < 1 else task for task, share in fidelity.tasks.items())
    live, own = fidelity.live, fidelity.measurements["lora"]
    has = "has the run's trained projector" if fidelity.projector == "base" else "is what it was trained on"
    weights = "NF4 weights" if fidelity.in_nf4 else "weights"
    text = f"""---{metadata}---

# LoRA for {shares}

Exported by qmixlora from a run that was tuned on several tasks: rank {fidelity.rank}, polished for \
{fidelity.polish_steps} steps. It needs `peft` and `transformers` alone:

```python
from peft import PeftModel
from transformers import AutoModelForImageTextToText

BASE = {base.model!r}
model = PeftModel.from_pretrained(AutoModelForImageTextToText.from_pretrained(BASE{base.typed()}), THIS_FOLDER)
```

The base {has}: on another one the adapter does something else. `qmixlora check THIS_FOLDER --url URL` asks a server
whether it applies the adapter.

On {fidelity.samples} samples (split {fidelity.split}), on the {weights} that it was trained on:

| | score ({fidelity.metrics}) | loss |
|---|---|---|
| the run itself | {live.score:.3f} | {live.loss:.3f} |
| this adapter | {own.score:.3f} | {own.loss:.3f} |

`{FIDELITY}` has the rest.
"""
    (folder / "README.md").write_text(text, encoding="utf-8")
