"""The section of a report on a run's exports: what each loses, and how to use it."""

from __future__ import annotations

from html import escape
from pathlib import Path
from typing import Any

from qmixlora.webpage import table

from ..charts import number
from ..readings import Reading, read_export
from ..record import RunRecord
from .routing import told

USE = {
    "lora": """from peft import PeftModel
from transformers import AutoModelForImageTextToText

base = AutoModelForImageTextToText.from_pretrained({base!r})
model = PeftModel.from_pretrained(base, {folder!r})

# or: qmixlora chat {folder} --image FILE""",
    "merged": """from transformers import AutoModelForImageTextToText

model = AutoModelForImageTextToText.from_pretrained({folder!r})

# or: qmixlora chat {folder} --image FILE""",
    "gguf": "{folder}/README.md says how llama.cpp serves it.",
}


def exports_section(record: RunRecord) -> str:
    """Every export with its fidelity; how to make some, where there is none."""
    if not record.exports:
        hint = f"None yet: qmixlora export {record.folder} --all --as lora"
        return f'<h2>Exports</h2><p class="quiet">{escape(hint)}</p>'
    head = ["export", "rank", "polished", "split", "live", "export's", "same words", "update error", ""]
    readings = [_reading(one) for one in record.exports]
    rows = [[*_row(one), reading.verdict] for one, reading in zip(record.exports, readings, strict=True)]
    lost = "".join(told(reading) for reading in readings if reading.verdict != "good")
    return f"<h2>Exports</h2>{table(head, rows)}{lost}<h3>To use them</h3>{_use(record)}"


def _row(one: dict[str, Any]) -> list[str]:
    form = one["form"]
    steps = one["polish_steps"]
    return [
        Path(one["folder"]).name,
        str(one["rank"]),
        f"{steps} steps" if steps else "-",
        one["split"],
        f"{one['exact_match']['live']:.3f}",
        f"{one['exact_match'][form]:.3f}",
        f"{one['agreement'][form]:.2f}",
        number(one["update_error"]["mean"]),
    ]


def _reading(one: dict[str, Any]) -> Reading:
    scores = one["exact_match"]
    reading = read_export(one["update_error"]["mean"], scores["live"], scores[one["form"]])
    return Reading(reading.verdict, f"{Path(one['folder']).name} has an {reading.text}")


def _use(record: RunRecord) -> str:
    """The lines that load an export of each form, and the one that talks to it."""
    parts = []
    for form in dict.fromkeys(one["form"] for one in record.exports):
        folder = next(one["folder"] for one in record.exports if one["form"] == form)
        code = USE[form].format(base=record.recipe.model.id, folder=folder)
        parts.append(f"<pre>{escape(code)}</pre>")
    return "".join(parts)
