"""A hook of mkdocs: every key of a recipe, with its values and default, in place of `<!-- keys -->` in recipes.md.

It reads what `qmixlora recipes schema` prints, from build/schema.json (see `make docs`), so the tables cannot go stale.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

SCHEMA = Path(__file__).parents[1] / "build" / "schema.json"
SECTIONS = {
    "model": "Model",
    "adapter": "Adapter",
    "data": "Data",
    "data.columns": "Columns",
    "data.train, where it is a list": "Part",
    "train": "Train",
    "train.checkpointing": "Checkpointing",
    "export": "Export",
}
LIMITS = {"minimum": "from {}", "exclusiveMinimum": "over {}", "maximum": "to {}", "exclusiveMaximum": "below {}"}


def on_page_markdown(markdown: str, **_: Any) -> str:
    """Called by mkdocs for every page."""
    mark = "<!-- keys -->"
    return markdown.replace(mark, tables(json.loads(SCHEMA.read_text("utf-8")))) if mark in markdown else markdown


def tables(schema: dict[str, Any]) -> str:
    """The sections of a recipe in Markdown."""
    lines = []
    for section, name in SECTIONS.items():
        part = schema["$defs"][name]
        lines += [f"### {section}", "", "| key | |", "|---|---|"]
        for key, field in part["properties"].items():
            told = [values(field), _default(field, key in part.get("required", ()))]
            cell = "<br>".join(filter(None, [field.get("description", ""), ", ".join(filter(None, told))]))
            lines.append(f"| `{key}` | {cell.replace('|', chr(92) + '|')} |")
        lines.append("")
    return "\n".join(lines)


def _default(field: dict[str, Any], required: bool) -> str:
    if required or "$ref" in field:
        return "**required**" if required else ""
    default = field.get("default")
    return f"default `{default if isinstance(default, str) else json.dumps(default)}`"


def values(field: dict[str, Any]) -> str:
    """What a field takes, in words."""
    if "$ref" in field:
        return "a section of its own"
    if "anyOf" in field:
        return " or ".join(values(one) for one in field["anyOf"] if one.get("type") != "null")
    if "enum" in field or "const" in field:
        return ", ".join(f"`{value}`" for value in field.get("enum", [field.get("const")]))
    if field["type"] == "array":
        return f"list of {values(field['items'])}"
    words = {"string": "text", "integer": "whole number", "object": "mapping", "boolean": "`true`, `false`"}
    limits = [said.format(field[name]) for name, said in LIMITS.items() if name in field]
    return ", ".join([words.get(field["type"], field["type"]), *limits])
