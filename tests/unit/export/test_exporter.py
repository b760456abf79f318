"""The exporter end to end: what it writes is measured and checked, or not there."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

import qmixlora.export.exporter as exporter
import qmixlora.export.merge as merge_module
from qmixlora.errors import CheckError, UserError
from qmixlora.export import Request, export
from qmixlora.session import open_run

from .helpers import QUIET, TASKS, edit_recipe, exported, logits, on_the_hub, recipe_of, rows_of


def exports_of(run: Path) -> list[str]:
    return sorted(path.name for path in (run / "exports").iterdir())


def test_a_wrong_merge_is_noticed_and_leaves_the_other_forms_alone(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    right = merge_module.add_update

    def wrong(weight: Tensor, update: Any) -> None:
        right(weight, replace(update, up_OK=update.up_OK * 1.02))  # as a scaling that was applied twice, a little

    monkeypatch.setattr(merge_module, "add_update", wrong)
    with pytest.raises(CheckError, match="does not compute what its adapter computes") as error:
        exported(run, forms=("merged",))
    assert error.value.exit_code == 1
    assert exports_of(run) == []
    with pytest.raises(CheckError):
        export(run, Request(tasks=TASKS, forms=("merged", "lora"), samples=1), QUIET)
    assert exports_of(run) == ["base", "color-lora", "count-lora", "picker"]
    assert all((run / "exports" / name / "fingerprint.json").is_file() for name in ("base", "color-lora", "count-lora"))


@pytest.mark.parametrize("base", ["nf4", "original"])
def test_rounding_in_16_bits_is_allowed(run: Path, base: Any) -> None:
    edit_recipe(run, model__dtype="bfloat16")
    merging = exported(run, forms=("merged",), base=base).merging
    assert merging is not None and 1e-5 < merging.logits_difference < 0.03


def test_a_missed_layer_is_more_than_rounding_in_16_bits(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    edit_recipe(run, model__dtype="bfloat16")
    right, calls = merge_module.add_update, []

    def forgetful(weight: Tensor, update: Any) -> None:
        calls.append(None)
        if len(calls) != 5:
            right(weight, update)

    monkeypatch.setattr(merge_module, "add_update", forgetful)
    with pytest.raises(CheckError):
        exported(run, forms=("merged",))
    assert len(calls) == 14


KILLED = """
import sys, time, qmixlora.export.merge as merge
from pathlib import Path
from rich.console import Console
from qmixlora.export import Request, export
merge.add_update = lambda *_: (print("merging", flush=True), time.sleep(600))
export(Path(sys.argv[1]), Request(tasks=("color",), forms=("merged",)), Console(quiet=True))
"""


@pytest.mark.long
def test_a_crash_leaves_nothing_that_looks_finished(run: Path) -> None:
    """Killed while it merges: no folder under an export's name, and the next export cleans up."""
    process = subprocess.Popen([sys.executable, "-c", KILLED, str(run)], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None and process.stdout.readline().strip() == "merging"
    process.send_signal(signal.SIGKILL)
    process.communicate()
    assert exports_of(run) and all(name.startswith(".") for name in exports_of(run))
    exported(run, forms=("merged",))
    assert exports_of(run) == ["color-merged"]


def test_a_disk_that_is_full_while_merging_leaves_the_finished_adapter(
    run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(merge_module, "add_update", full)
    with pytest.raises(UserError, match="The disk is full"):
        export(run, Request(tasks=("color",), forms=("lora", "merged")), QUIET)
    assert exports_of(run) == ["base", "color-lora"]  # whole, and measured
    assert (run / "exports" / "color-lora" / "fidelity.json").is_file()


def test_exports_of_one_run_at_once_leave_each_other_alone(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The second one begins and ends while the first one has its adapters ready to merge."""
    make_picker = exporter.make_picker

    def meanwhile(*arguments: Any) -> Any:
        monkeypatch.setattr(exporter, "make_picker", make_picker)
        with monkeypatch.context() as patch:
            patch.setattr(os, "getpid", os.getppid)  # as another process that runs
            exported(run, forms=("merged",), tasks=("count",), samples=1)
        return make_picker(*arguments)

    monkeypatch.setattr(exporter, "make_picker", meanwhile)
    exported(run, forms=("merged",), samples=1)
    assert exports_of(run) == ["color-merged", "count-merged", "picker"]


def test_task_routing_exports_exactly(make_run: Callable[..., Path]) -> None:
    for fidelity in export(make_run(route_on="task"), Request(tasks=TASKS), QUIET):
        lora = fidelity.measurements["lora"]
        assert fidelity.update_error.mean < 1e-6 and lora.agreement(fidelity.live) == 1.0
        assert lora.loss == pytest.approx(fidelity.live.loss, abs=1e-5)


def test_a_plain_lora_run_exports_through_the_same_verb(make_run: Callable[..., Path]) -> None:
    run = make_run(method="lora", r=4)
    fidelity = exported(run)
    assert fidelity.update_error.mean < 1e-6 and fidelity.rank == 4
    assert fidelity.measurements["lora"].agreement(fidelity.live) == 1.0
    rows = rows_of(run, "color")
    expected = logits(open_run(run), rows)
    torch.testing.assert_close(logits(open_run(run / "exports" / "color-lora"), rows), expected, atol=1e-4, rtol=0)


def test_a_card_names_the_metric_and_the_weights_that_it_was_measured_by(run: Path) -> None:
    edit_recipe(run, model__quantization="none", data__metrics={"*": "anls"})
    card = (exported(run, samples=1).folder / "README.md").read_text()
    assert "| | score (anls) | loss |" in card and "on the weights that it was trained on" in card


@pytest.fixture
def some_layers(make_run: Callable[..., Path]) -> Path:
    return make_run(target_modules=["q_proj", "v_proj"], projector="frozen")


def test_layers_without_an_adapter_went_through_nf4_too(some_layers: Path) -> None:
    """A run has in NF4 also layers that it does not adapt: they are merged as the run was trained on them."""
    fidelity = exported(some_layers, forms=("merged",))
    assert fidelity.merging is not None and fidelity.merging.logits_difference < 1e-4
    assert len(fidelity.update_error.layers) == 4
    changed = load_file(some_layers / "exports" / "color-merged" / "model.safetensors")
    base = on_the_hub(load_file(Path(recipe_of(some_layers).model.id) / "model.safetensors"))
    different = {name for name, tensor in base.items() if not torch.equal(tensor, changed[name])}
    assert len(different) == 14 and not any("projector" in name for name in different)


def test_without_a_projector_there_is_no_note(some_layers: Path) -> None:
    assert exported(some_layers).notes == ()
