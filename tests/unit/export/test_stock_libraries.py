"""Exports in processes without qmixlora: stock libraries load them, and compute what they say."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

from qmixlora.export import Request, export, exported_tasks
from qmixlora.export.settings import GENERATION
from qmixlora.export.static import learned_by, lora_session, read
from qmixlora.session import open_model, open_run, open_tuned_run

from .helpers import QUIET, exported, logits, name_on_the_hub, rows_of, save_inputs, unquantised, without_qmixlora

STOCK_PEFT = """
import json, sys, warnings, torch
from peft import PeftModel
from safetensors.torch import load_file, save_file
from transformers import AutoModelForImageTextToText
base, adapter, inputs, out = sys.argv[1:5]
model = AutoModelForImageTextToText.from_pretrained(base, dtype=torch.float32)
with warnings.catch_warnings():
    warnings.filterwarnings("error", message=".*(missing|unexpected).*key")  # as PEFT warns of them
    model = PeftModel.from_pretrained(model, adapter).eval()
with torch.no_grad():
    save_file({"logits": model(**load_file(inputs)).logits}, out)
print(json.dumps({"method": model.peft_config["default"].peft_type}))
"""
STOCK_TRANSFORMERS = """
import json, sys, torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForImageTextToText, AutoProcessor
folder, inputs, out = sys.argv[1:4]
model, info = AutoModelForImageTextToText.from_pretrained(folder, dtype="auto", output_loading_info=True)
AutoProcessor.from_pretrained(folder)
with torch.no_grad():
    save_file({"logits": model.eval()(**load_file(inputs)).logits}, out)
print(json.dumps({name: sorted(map(str, keys)) for name, keys in info.items()}))
"""


def test_an_exported_lora_is_stock_peft(run: Path, tmp_path: Path) -> None:
    """The same by hand: the original model with the trained projector, and every update added to its weights."""
    base = run / "exports" / "base"
    exported(run)
    folder, rows, out = run / "exports" / "color-lora", rows_of(run, "color"), tmp_path / "out.safetensors"
    inputs = save_inputs(open_run(run), rows, tmp_path / "inputs.safetensors")
    assert without_qmixlora(STOCK_PEFT, base, folder, inputs, out) == {"method": "LORA"}
    session, adapter = open_model(unquantised(run)), read(folder)
    projector = learned_by(open_tuned_run(run).model).modules
    with torch.no_grad():
        for layer, update in adapter.updates.items():
            session.model.get_submodule(layer).weight += update.up_OK @ update.down_KI
        for name, value in projector.items():
            session.model.get_parameter(name).copy_(value)
    torch.testing.assert_close(load_file(out)["logits"], logits(session, rows), atol=1e-4, rtol=0)


def test_an_exported_lora_says_what_it_is(run: Path) -> None:
    fidelity = exported(run)
    folder = run / "exports" / "color-lora"
    assert fidelity.to_dict() == json.loads((folder / "fidelity.json").read_text())
    assert exported_tasks(folder) == ["color"]
    card = (folder / "README.md").read_text()
    assert "base_model:" in card and "# LoRA for color" in card and "More Information Needed" not in card


@pytest.mark.parametrize("base", ["nf4", pytest.param("original", marks=pytest.mark.long)])
def test_a_merged_checkpoint_is_stock_transformers(run: Path, tmp_path: Path, base: Any) -> None:
    exported(run, projector="adapter")
    exported(run, forms=("merged",), base=base)
    session = open_run(run) if base == "nf4" else open_model(unquantised(run))
    adapter, rows, out = read(run / "exports" / "color-lora"), rows_of(run, "color"), tmp_path / "out.safetensors"
    expected = logits(lora_session(session, adapter), rows)
    inputs = save_inputs(session, rows, tmp_path / "inputs.safetensors")
    info = without_qmixlora(STOCK_TRANSFORMERS, run / "exports" / "color-merged", inputs, out)
    assert not any(info.values()), info
    computed = load_file(out)["logits"]
    torch.testing.assert_close(computed, expected, atol=1e-4, rtol=0)
    assert (computed - logits(open_model(unquantised(run)), rows)).abs().max() > 0.1  # the update is no trifle


@pytest.mark.parametrize("base", ["nf4", "original"])
def test_a_merged_checkpoint_has_the_files_of_its_base(run: Path, backbone: Path, base: Any) -> None:
    exported(run, forms=("merged",), base=base)
    folder = run / "exports" / "color-merged"
    copied = [path for path in backbone.iterdir() if path.suffix != ".safetensors" and path.name != GENERATION]
    assert all((folder / path.name).read_bytes() == path.read_bytes() for path in copied) and len(copied) >= 4
    with safe_open(backbone / "model.safetensors", "pt") as old, safe_open(folder / "model.safetensors", "pt") as new:
        assert {name_on_the_hub(name) for name in old.keys()} == set(new.keys())  # noqa: SIM118


@pytest.mark.parametrize("base", ["nf4", "original"])
def test_both_forms_of_an_export_are_measured_on_the_same_rows(run: Path, base: Any) -> None:
    lora, merged = export(run, Request(tasks=("color",), forms=("lora", "merged"), base=base), QUIET)
    assert (lora.form, merged.form, merged.to_dict()["base"]) == ("lora", "merged", base)
    assert merged.measurements["lora"] == lora.measurements["lora"]
    assert merged.to_dict()["agreement"].keys() == {"lora", "merged"}
