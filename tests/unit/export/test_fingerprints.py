"""The last pass of an export: fingerprints, which no export depends on."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

import qmixlora.export.fingerprints as fingerprints
from qmixlora.export import Request, export
from qmixlora.manifest import first_change


def test_an_export_stays_where_stock_libraries_cannot_ask_its_model(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*arguments: Any, **options: Any) -> None:
        raise RuntimeError("no such processor")

    monkeypatch.setattr(fingerprints, "load_model", refuse)
    with (tmp_path / "said").open("w") as file:
        export(run, Request(tasks=("color",)), Console(file=file, width=300))
    said = (tmp_path / "said").read_text()
    assert "fingerprint to check servers by: RuntimeError: no such processor" in said
    assert first_change(run / "exports" / "color-lora") is None
    assert sorted(path.name for path in (run / "exports").iterdir()) == ["base", "color-lora"]
