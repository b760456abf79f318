"""The section of a report on what was trained on what."""

from __future__ import annotations

from html import escape
from typing import Any

from qmixlora.webpage import folded, table

from ..contents import Survey
from ..record import RunRecord

TASKS = 40  # of a split that are listed, the largest


def origin_section(record: RunRecord) -> str:
    """What was trained on what: recipe, data survey, versions and the data's fingerprint."""
    model, adapter, spec = record.recipe.model, record.recipe.adapter, record.recipe.train
    active = "all" if adapter.gate == "dense" or adapter.r == adapter.num_factors else adapter.r
    kind = f"{adapter.num_factors} factors, {active} active" if adapter.method == "mixlora" else f"rank {adapter.r}"
    routed = f", routed on {adapter.route_on}, {adapter.pairing}, {adapter.gate}" if adapter.method == "mixlora" else ""
    facts = [
        ["model", f"{model.id}{f' ({model.revision})' if model.revision else ''}, {model.quantization}, {model.dtype}"],
        ["adapter", f"{adapter.method}: {kind}, alpha {adapter.alpha:g}{routed}"],
        ["data", ", ".join(record.recipe.data.sources)],
        [
            "batch",
            f"{spec.micro_batch_size} x {spec.gradient_accumulation} samples a step, {spec.optimizer} at "
            f"{spec.learning_rate:g}, {spec.schedule}",
        ],
        ["data's fingerprint", record.fingerprint or "not kept"],
        ["versions", ", ".join(f"{name} {version}" for name, version in record.versions.items()) or "not kept"],
        [
            "history",
            "; ".join(f"{_time(one)} {one.get('event')} at step {one.get('step')}" for one in record.history),
        ],
        ["folder", str(record.folder)],
    ]
    survey = _survey(record.survey) if record.survey else ""
    recipe = folded("recipe.yaml", f"<pre>{escape(record.text)}</pre>")
    return f"<h2>What was trained on what</h2>{table(['', ''], facts, left=[1])}{survey}{recipe}"


def _time(event: dict[str, Any]) -> str:
    """When it was, to the second, for people."""
    return str(event.get("time")).replace("T", " ").replace("+00:00", " UTC")


def _survey(survey: Survey) -> str:
    rows, parts = [], []
    for split in survey.splits:
        tokens = split.tokens or {}
        told = [f"{tokens[key]:.0f}" if key in tokens else "-" for key in ("median", "largest", "largest_of_images")]
        rows.append([split.split, str(split.samples), str(split.left_out), str(len(split.tasks)), *told])
        largest = sorted(split.tasks.items(), key=lambda item: -item[1])
        listed = table(["task", "samples"], [[task, str(count)] for task, count in largest[:TASKS]], tall=True)
        more = f" (the largest {TASKS} of {len(largest)})" if len(largest) > TASKS else ""
        parts.append(folded(f"Tasks of {split.split}{more}", listed))
    warnings = "".join(f'<p class="warning">{escape(warning)}</p>' for warning in survey.warnings)
    head = ["split", "samples", "left out", "tasks", "tokens: median", "largest", "of images"]
    return f"<h3>Data</h3>{table(head, rows)}{''.join(parts)}{warnings}"
