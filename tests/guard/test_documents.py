"""The documents name what the code has."""

from __future__ import annotations

from pathlib import Path

from qmixlora.backbone.levers.table import LEVERS

ROOT = Path(__file__).parents[2]


def test_every_lever_is_in_the_memory_document() -> None:
    text = (ROOT / "docs" / "memory.md").read_text(encoding="utf-8")
    table = text.partition("## Levers")[2].partition("\n## ")[0]
    for lever in LEVERS:
        section, _, key = lever.key.partition(".")
        assert f"`{section}.{key}" in table or f"`.{key.rpartition('.')[2]}`" in table, lever.key


def test_every_verb_is_in_the_readme() -> None:
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    verbs = {path.stem for path in (ROOT / "cli").glob("*.py")} - {"__init__", "here", "main", "quiet"}
    for verb in verbs:
        assert f"qmixlora {'eval' if verb == 'evaluate' else verb}" in text, verb
