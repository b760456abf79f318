"""The section of a report on a run's exports: what each loses, and how to use it."""

from __future__ import annotations

import json
import shlex
from contextlib import suppress
from html import escape
from pathlib import Path

from qmixlora.bases import Source, source_below
from qmixlora.errors import UserError, typed
from qmixlora.serving.files.places import options_of_source, vllm_rank
from qmixlora.webpage import table

from ..contents import ExportFidelity
from ..readings import Reading, lossy, read_export
from ..record import RunRecord
from .routing import told

ASKED = """# {chat}
# {check}    (whether a server applies it)"""
USE = {
    "lora": """from peft import PeftModel
from transformers import AutoModelForImageTextToText

base = AutoModelForImageTextToText.from_pretrained({base!r}{arguments})
model = PeftModel.from_pretrained(base, {folder!r})

# vllm serve {served} --enable-lora --max-lora-rank {rank} --lora-modules {module}
"""
    + ASKED,
    "merged": """from transformers import AutoModelForImageTextToText

model = AutoModelForImageTextToText.from_pretrained({folder!r})

# {vllm}
"""
    + ASKED,
    "gguf": "{folder}/README.md says how llama.cpp serves it.",
}


def exports_section(record: RunRecord) -> str:
    """Every export with its fidelity; how to make some, where there is none."""
    if not record.exports:
        hint = f"None yet: {typed('export', record.folder, '--all', '--as', 'lora')}"
        return f'<h2>Exports</h2><p class="quiet">{escape(hint)}</p>'
    head = ["export", "rank", "polished", "split", "live", "export's", "same words", "update error", "verdict"]
    readings = [_reading(one) for one in record.exports]
    rows = [[*_row(one), reading.verdict] for one, reading in zip(record.exports, readings, strict=True)]
    names = [one.name for one in record.exports]
    lost = "".join(map(told, lossy(zip(names, readings, strict=True))))
    return f"<h2>Exports</h2>{table(head, rows)}{lost}<h3>To use them</h3>{_use(record)}"


def _row(one: ExportFidelity) -> list[str]:
    return [
        one.name,
        str(one.rank),
        f"{one.polish_steps} steps" if one.polish_steps else "-",
        one.split,
        f"{one.exact_match['live']:.3f}",
        f"{one.exact_match[one.form]:.3f}",
        f"{one.agreement[one.form]:.2f}",
        f"{one.update_error.mean:.2f}",
    ]


def _reading(one: ExportFidelity) -> Reading:
    return read_export(one.update_error.mean, one.exact_match["live"], one.exact_match[one.form])


def _use(record: RunRecord) -> str:
    """The lines that load and serve an export of each form, and those that talk to it and check it."""
    parts = []
    for form in dict.fromkeys(one.form for one in record.exports):
        first = next(one for one in record.exports if one.form == form)
        folder = record.folder / "exports" / first.name
        base = (_base(folder) if form == "lora" else None) or Source(record.recipe.model.id)
        filled = USE[form].format(
            folder=str(folder),
            base=base.model,
            arguments=base.typed(),
            chat=typed("chat", folder, "--image", "FILE"),
            check=typed("check", folder, "--url", "URL"),
            vllm=typed("serve", folder, program="vllm"),
            served=shlex.join([base.model, *options_of_source(base)]),
            rank=vllm_rank(first.rank),
            # in vLLM's NAME=PATH a name would end at the first `=`, which mixtures have
            module=shlex.quote(json.dumps({"name": folder.name, "path": str(folder)}, ensure_ascii=False)),
        )
        parts.append(f"<pre>{escape(filled)}</pre>")
    return "".join(parts)


def _base(adapter: Path) -> Source | None:
    """What an adapter lies on; None where that cannot be told any more."""
    with suppress(UserError):
        return source_below(adapter)
    return None
