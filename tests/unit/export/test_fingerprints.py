"""The last pass of an export: fingerprints, which no export depends on."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import get_peft_model_state_dict
from rich.console import Console
from safetensors.torch import load_file
from torch import nn

import qmixlora.export.fingerprints as fingerprints
from qmixlora.export import Request, export
from qmixlora.manifest import first_change
from qmixlora.serving import stock
from qmixlora.serving.check import check
from qmixlora.serving.comparison import difference
from qmixlora.serving.fingerprint import EXPORT, NO_PROJECTOR, read_fingerprint
from qmixlora.serving.local import with_peft

from .helpers import TASKS, exported


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


def test_an_adapter_goes_onto_an_offloaded_model_that_has_none(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """PEFT puts the first adapter of a model where accelerate keeps its offloaded layers, and no later one."""
    folders = [exported(run, tasks=(task,)).folder for task in TASKS]
    model = stock.load_model(run / "exports" / "base")
    bases = []
    for offloaded in (False, False, True):
        monkeypatch.setattr(stock, "is_offloaded", lambda model, offloaded=offloaded: offloaded)
        stock.put_adapter(model, folders[0])
        stock.put_adapter(model, folders[1])
        [name] = model.model.peft_config
        put = get_peft_model_state_dict(model.model, adapter_name=name)
        own = load_file(folders[1] / "adapter_model.safetensors")
        assert put.keys() == own.keys() and all(torch.equal(put[key], own[key]) for key in own)
        bases.append(model.model.get_base_model())
    assert bases[0] is bases[1] and bases[1] is not bases[2]


def test_a_model_is_offloaded_when_a_part_is_not_on_the_gpu() -> None:
    model = nn.Linear(2, 2, device="meta")
    assert not stock.is_offloaded(model)
    for places, offloaded in (({"": 0}, False), ({"a": 0, "b": "cpu"}, True), ({"a": 0, "b": "disk"}, True)):
        model.hf_device_map = places
        assert stock.is_offloaded(model) is offloaded
    whole = stock.StockModel(model, lambda: model, None, [], {})
    with (
        pytest.raises(RuntimeError, match="weight does not fit"),
        stock.with_values(whole, {"weight": torch.ones(2, 2)}),
    ):
        pass
