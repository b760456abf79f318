"""Polished adapters that a run keeps, and what makes one another."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import qmixlora.export.adapters as adapters_module
from qmixlora.data import Collator
from qmixlora.export.job import Job
from qmixlora.export.polish import polish
from qmixlora.export.polished import fingerprint_of
from qmixlora.export.static import read
from qmixlora.export.targets import Request, make_targets
from qmixlora.session import open_tuned_run

from .helpers import QUIET, TASKS, edit_recipe, exported, recipe_of


@pytest.fixture
def polishings(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The steps of every polishing, which goes on as ever."""
    seen: list[int] = []

    def watched(session: Any, adapter: Any, rows: Any, steps: int, *arguments: Any, **options: Any) -> None:
        seen.append(steps)
        polish(session, adapter, rows, steps, *arguments, **options)

    monkeypatch.setattr(adapters_module, "polish", watched)
    return seen


def test_a_second_export_that_is_made_in_the_same_way_polishes_nothing(run: Path, polishings: list[int]) -> None:
    first = exported(run, polish=2)
    adapter = read(run / "exports" / "color-lora")
    merged = exported(run, polish=2, forms=("merged",))
    again = exported(run, polish=2, samples=3)
    assert polishings == [2]
    assert first.polish_steps == merged.polish_steps == again.polish_steps == 2
    for layer, update in read(run / "exports" / "color-lora").updates.items():
        torch.testing.assert_close(update.up_OK, adapter.updates[layer].up_OK, atol=0, rtol=0)
    assert merged.measurements["lora"].loss == first.measurements["lora"].loss


def test_a_decision_is_kept_with_its_rows(run: Path, polishings: list[int]) -> None:
    edit_recipe(run, export__polish=2)
    first = exported(run)
    again = exported(run)
    assert len(polishings) <= 1 and again.decided_on == first.decided_on == "train, left out of polishing"
    assert (again.polish_steps, again.polish_tried) == (first.polish_steps, first.polish_tried)


def test_a_kept_adapter_that_cannot_be_read_is_polished_anew(run: Path, polishings: list[int]) -> None:
    exported(run, polish=2)
    kept = run / "polished" / "color.safetensors"
    kept.write_bytes(kept.read_bytes()[:-40])
    assert exported(run, polish=2).polish_steps == 2 and polishings == [2, 2]


def test_the_fingerprint_of_a_polishing_tells_what_decides_it(run: Path) -> None:
    """Other weights, settings, rows or mixing matrices give another; what is done with the adapter does not."""
    session = open_tuned_run(run)
    collator = session.collator
    assert isinstance(collator, Collator)
    mix_LEF = torch.zeros(2, 4, 4)

    def fingerprint(mix_LEF: torch.Tensor = mix_LEF, **request: Any) -> str:
        job = Job(run, recipe_of(run), Request(**{"tasks": ("color",), "polish": 2, **request}), QUIET, collator)
        return fingerprint_of(job, make_targets(job.request, TASKS)[0], mix_LEF)

    same = fingerprint()
    assert {same, fingerprint(forms=("merged",)), fingerprint(samples=5), fingerprint(base="original")} == {same}
    prints = [same, fingerprint(polish=3), fingerprint(rank=2), fingerprint(mix_LEF + 1)]
    edit_recipe(run, train__learning_rate=1e-3)
    prints.append(fingerprint())
    source = Path(recipe_of(run).data.sources[0])
    rows = json.loads(source.read_text())
    moved = {"data__train": str(run / "other.json"), "data__image_root": str(source.parent)}
    edit_recipe(run, train__learning_rate=3e-2, **moved)
    first, other = [row for row in rows if row["task"] == "color"][:2]
    for edit in ({}, {"conversations": other["conversations"]}, {"image": other["image"]}):
        first |= edit
        (run / "other.json").write_text(json.dumps(rows))
        prints.append(fingerprint())
    weights = run / "adapter" / "adapter_model.safetensors"
    save_file({name: tensor + 1 for name, tensor in load_file(weights).items()}, weights)
    prints.append(fingerprint())
    assert len(set(prints)) == len(prints)
