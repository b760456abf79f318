"""The documents name what the code has."""

from __future__ import annotations

import re
import runpy
from pathlib import Path

from qmixlora.backbone.levers.table import LEVERS
from qmixlora.recipe import json_schema

ROOT = Path(__file__).parents[2]


def test_every_lever_is_in_the_memory_document() -> None:
    text = (ROOT / "docs" / "memory.md").read_text(encoding="utf-8")
    table = text.partition("## Levers")[2].partition("\n## ")[0]
    for lever in LEVERS:
        section, _, key = lever.key.partition(".")
        assert f"`{section}.{key}" in table or f"`.{key.rpartition('.')[2]}`" in table, lever.key


def test_every_verb_is_on_the_page_of_commands() -> None:
    text = (ROOT / "docs" / "commands.md").read_text(encoding="utf-8")
    verbs = {path.stem for path in (ROOT / "cli").glob("*.py")} - {
        "__init__",
        "ending",
        "here",
        "main",
        "output",
        "overrides",
        "quiet",
    }
    for verb in verbs:
        assert f"qmixlora {'eval' if verb == 'evaluate' else verb.replace('_', '-')}" in text, verb


def test_every_symptom_that_quotes_a_message_quotes_one_that_there_is() -> None:
    files = [*(ROOT / "qmixlora").rglob("*.py"), *(ROOT / "cli").glob("*.py")]
    said = "\n".join(file.read_text(encoding="utf-8") for file in files)
    text = (ROOT / "docs" / "troubleshooting.md").read_text(encoding="utf-8")
    symptoms = [line.split(" | ")[0] for line in text.splitlines() if line.startswith("| ")]
    quoted = [message for symptom in symptoms for message in re.findall(r"`([^`]+)`", symptom)]
    assert len(quoted) > 30
    for message in quoted:
        for part in re.split(r"\bN\b|\bW x H\b|\.\.\.", message):
            assert part.strip() in said, message


def test_the_page_of_recipes_has_every_key_of_every_section() -> None:
    hook, schema = runpy.run_path(str(ROOT / "docs" / "recipe_keys.py")), json_schema()
    assert set(hook["SECTIONS"].values()) == schema["$defs"].keys()
    tables = hook["tables"](schema)
    for part in schema["$defs"].values():
        for key in part["properties"]:
            assert f"| `{key}` | " in tables
    assert "<!-- keys -->" in (ROOT / "docs" / "recipes.md").read_text(encoding="utf-8")
