"""Images are looked at once, those of many rows by several processes, with the same result."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from qmixlora.data.reading import loading, looks
from qmixlora.data.reading.loading import load
from qmixlora.data.reading.rows import Reading

from ..helpers import GPT, HUMAN


@pytest.fixture
def source(write_json: Callable[[str, Any], Path], tmp_path: Path) -> str:
    """Thirty rows about ten images, of which one is missing, one broken and one too large."""
    for index in range(9):
        Image.new("RGB", (40, 60 if index == 7 else 20)).save(tmp_path / f"{index}.png")
    (tmp_path / "8.png").write_bytes(b"\x89PNG broken")
    return str(write_json("d.json", [{"image": f"{row % 10}.png", "conversations": [HUMAN, GPT]} for row in range(30)]))


@pytest.mark.parametrize(("many", "rows"), [(1000, 10_000), (1, 10_000), (1, 4)])
def test_processes_find_what_one_finds(source: str, monkeypatch: pytest.MonkeyPatch, many: int, rows: int) -> None:
    monkeypatch.setattr(looks, "MANY", many)
    monkeypatch.setattr(looks, "CHUNK", 2)
    monkeypatch.setattr(loading, "ROWS", rows)
    found = load(source, "train", None, Reading(), max_pixels=1000)
    assert len(found.rows) == 21 and found.refused.count == found.refused.pictures == 9
    assert [where.partition("row ")[2][:2].strip() for where, _ in found.refused.first] == [
        *"789",
        "17",
        "18",
        "19",
        "27",
        "28",
        "29",
    ]


def test_an_image_is_opened_once_however_many_rows_name_it(source: str, monkeypatch: pytest.MonkeyPatch) -> None:
    opened: list[str] = []
    check = looks.check_header
    monkeypatch.setattr(
        looks, "check_header", lambda file, *given, **named: opened.append(file["path"]) or check(file, *given, **named)
    )
    load(source, "train", None, Reading())
    whole = [path for path in opened if not path.endswith(("8.png", "9.png"))]
    assert len(whole) == len(set(whole)) == 8
