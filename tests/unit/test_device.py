"""What consumer machines are: Windows and macOS without `resource`, drivers that spill, cards before Ampere."""

from __future__ import annotations

import subprocess
import sys
import weakref
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from qmixlora import device, doctor
from qmixlora.device import GIB
from qmixlora.garbage import without_garbage_collection
from qmixlora.recipe import Data, Model, Recipe
from qmixlora.training import arguments

HIDDEN = """
import os
import sys
import asyncio, psutil  # which themselves need these on this system alone
sys.modules["resource"] = None  # as on Windows
del os.sysconf
from qmixlora.device import peak_memory_gib
from qmixlora.doctor import examine
assert peak_memory_gib() > 0.01
print([finding.what for finding in examine()])
"""


def test_what_unix_alone_has_is_not_needed() -> None:
    done = subprocess.run([sys.executable, "-c", HIDDEN], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "host memory" in done.stdout


@pytest.fixture
def allocator(monkeypatch: pytest.MonkeyPatch) -> list[object]:
    """A GPU's allocator, which notes its settings."""
    settings: list[object] = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda: (6 * GIB, 8 * GIB))
    monkeypatch.setattr(torch.cuda, "set_per_process_memory_fraction", settings.append)
    monkeypatch.setattr(torch.cuda.memory, "_set_allocator_settings", settings.append)
    device.prepare_card.cache_clear()
    return settings


def allocation(error: Exception | None, monkeypatch: pytest.MonkeyPatch) -> None:
    def empty(*_: object, **__: object) -> None:
        if error is not None:
            raise error

    monkeypatch.setattr(torch, "empty", empty)


def test_expandable_segments_that_fail_are_switched_off(
    allocator: list[object], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(device, "spills", lambda: False)
    allocation(RuntimeError("CUDA driver error: unknown error"), monkeypatch)
    device.prepare_card()
    assert allocator == ["expandable_segments:False"]


def test_a_driver_that_spills_is_held_to_the_memory_that_is_free(
    allocator: list[object], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(device, "spills", lambda: True)
    allocation(None, monkeypatch)
    device.prepare_card()
    assert allocator == [0.75]


def test_other_machines_are_left_alone(allocator: list[object], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(device, "spills", lambda: False)
    allocation(None, monkeypatch)
    device.prepare_card()
    assert allocator == []


@pytest.mark.parametrize(("major", "slow"), [(7, True), (8, False), (12, False)])
def test_the_doctor_says_which_cards_are_slow_in_bfloat16(
    major: int, slow: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    properties = SimpleNamespace(name="a card", major=major, minor=5, total_memory=8 * GIB)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda index: properties)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda: (7 * GIB, 8 * GIB))
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    found = doctor._gpu().found
    assert f"compute capability {major}.5" in found and "7.0 of 8.0 GiB free" in found
    assert "the first of 2; `train --processes 2` uses all of them" in found
    assert ("float16" in found) is slow


class Loop:
    """Garbage that only a search for cycles finds, as models are."""

    def __init__(self) -> None:
        self.own = self


def test_room_is_made_of_models_that_nobody_uses(allocator: list[object], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(device, "spills", lambda: False)
    allocation(None, monkeypatch)
    with without_garbage_collection():
        model = weakref.ref(Loop())
        assert model() is not None
        device.make_room()
        assert model() is None


@pytest.mark.parametrize(
    ("gpu", "spilling", "pinned"), [(False, False, False), (True, False, True), (True, True, False)]
)
def test_batches_are_pinned_where_there_is_a_way_around_it(
    gpu: bool, spilling: bool, pinned: bool, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    recipe = Recipe(model=Model(id="m"), data=Data(train="d"))
    only = SimpleNamespace(cuda=SimpleNamespace(is_available=lambda: gpu))
    monkeypatch.setattr(arguments, "torch", only)
    monkeypatch.setattr(arguments, "spills", lambda: spilling)
    made = arguments.arguments_of(recipe, tmp_path, evaluates=False, workers=0)
    assert made.dataloader_pin_memory is pinned
