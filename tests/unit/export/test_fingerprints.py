"""The last pass of an export: fingerprints, which no export depends on."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

import qmixlora.export.fingerprints as fingerprints
from qmixlora.export import Request, export
from qmixlora.manifest import first_change
from qmixlora.serving.check import check
from qmixlora.serving.comparison import difference
from qmixlora.serving.fingerprint import EXPORT, NO_PROJECTOR, read_fingerprint
from qmixlora.serving.local import with_peft

from .helpers import exported


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


@pytest.mark.parametrize("projector", ["base", "adapter", "low-rank"])
def test_a_fingerprint_knows_the_export_without_its_projector_wherever_that_is(run: Path, projector: Any) -> None:
    exported(run, projector=projector, fingerprint=True, samples=1)
    folder = run / "exports" / "color-lora"
    fingerprint = read_fingerprint(folder)
    own, without = ([prompt.answers[whose] for prompt in fingerprint.prompts] for whose in (EXPORT, NO_PROJECTOR))
    assert difference(without, own).mean > 0.01
    pairs = zip(own, without, fingerprint.prompts, strict=True)
    assert all((one == other) is not prompt.has_image for one, other, prompt in pairs)
    report = check(fingerprint, with_peft(folder, fingerprint, None))
    assert report.verdict == "applied" and report.found[EXPORT].mean < 1e-4
