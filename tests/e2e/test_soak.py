"""Soak: a run and its exports that are killed again and again lose nothing, and a long run does not grow.

QMIXLORA_SOAK_SEED chooses other moments (default: 0).
"""

from __future__ import annotations

import multiprocessing
import os
import random
import shutil
import time
from collections.abc import Callable
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
from rich.console import Console
from safetensors.torch import load_file

from qmixlora.files import read_log
from qmixlora.manifest import MANIFEST, first_change
from qmixlora.mixlora.routing_record import FILE
from qmixlora.recipe import Recipe
from qmixlora.training import train
from qmixlora.training.checkpoints import damage
from qmixlora.training.finite import FiniteParameters
from tests.conftest import CommandLine

SEED = int(os.environ.get("QMIXLORA_SOAK_SEED", "0"))
KILLS, STEPS, GROWTH = 20, 100, 2000
SAVING = ("train.save_every=1", "train.keep_checkpoints=2", f"train.max_steps={STEPS}", "train.micro_batch_size=2")
EXPORT = ("--task", "digit", "--polish", 2, "--samples", 2, "--as", "lora", "--as", "merged")


@pytest.fixture
def moments(capsys: pytest.CaptureFixture[str]) -> random.Random:
    with capsys.disabled():
        print(f"\nQMIXLORA_SOAK_SEED={SEED}")
    return random.Random(SEED)


def started(qmixlora: CommandLine, *arguments: object) -> BaseProcess:
    """The command line in a process of its own."""

    def work() -> None:
        os._exit(qmixlora(*arguments).code)

    child = multiprocessing.get_context("fork").Process(target=work)
    child.start()
    return child


def killed(child: BaseProcess, is_time: Callable[[], bool], delay: float) -> bool:
    """Kill a process so many seconds after it is time; false if it had ended before."""
    while child.is_alive() and not is_time():
        time.sleep(0.001)
    child.join(delay)
    was_alive = child.is_alive()
    child.kill()  # SIGKILL
    child.join()
    return was_alive


def last_step(run: Path) -> int:
    return max([record["step"] for record in read_log(run / "metrics.jsonl")], default=0)


def is_being_saved(run: Path) -> bool:
    """Whether there is a checkpoint that says of itself that it is not whole."""
    return any(damage(path) is not None for path in (run / "checkpoints").glob("checkpoint-*"))


def same(one: Path, other: Path) -> bool:
    own, expected = load_file(one), load_file(other)
    return own.keys() == expected.keys() and all(torch.equal(own[name], tensor) for name, tensor in expected.items())


@pytest.mark.exhaustive
def test_a_run_that_is_killed_twenty_times_ends_as_one_that_never_was(
    qmixlora: CommandLine, recipe_file: Path, tmp_path: Path, moments: random.Random
) -> None:
    straight, run = tmp_path / "straight", tmp_path / "run"
    assert qmixlora("train", recipe_file, *SAVING, f"train.output={straight}").code == 0
    kills = inside_saves = 0
    while kills < KILLS:
        whole = any(damage(path) is None for path in (run / "checkpoints").glob("checkpoint-*"))
        if not whole:
            shutil.rmtree(run, ignore_errors=True)  # as the message says
        step = last_step(run) + (moments.randrange(3) if whole else 1)
        in_a_save, delay = moments.random() < 0.5, moments.random() * 0.2

        def is_time(step: int = step, in_a_save: bool = in_a_save) -> bool:
            return last_step(run) >= step and (not in_a_save or is_being_saved(run))

        child = started(qmixlora, "train", recipe_file, *SAVING, *(["--resume"] if whole else []))
        kills += killed(child, is_time, 0.0 if in_a_save else delay)
        inside_saves += is_being_saved(run)
        assert last_step(run) < STEPS
    assert inside_saves
    done = qmixlora("train", run, "--resume")
    assert done.code == 0, done.stderr
    for name in ("adapter/adapter_model.safetensors", FILE):
        assert same(run / name, straight / name), name
    assert [record["step"] for record in read_log(run / "metrics.jsonl") if "loss" in record] == [*range(1, STEPS + 1)]


@pytest.mark.exhaustive
def test_an_export_that_is_killed_again_and_again_leaves_the_one_before_and_ends_as_one_that_never_was(
    qmixlora: CommandLine, copied_run: Path, tmp_path: Path, moments: random.Random
) -> None:
    straight = Path(shutil.copytree(copied_run, tmp_path / "straight"))
    assert qmixlora("export", straight, *EXPORT).code == 0
    begun = time.monotonic()
    assert qmixlora("export", copied_run, *EXPORT).code == 0
    duration = time.monotonic() - begun
    names = ["base", "digit-lora", "digit-merged"]
    for _ in range(KILLS // 2):
        killed(started(qmixlora, "export", copied_run, *EXPORT), lambda: True, moments.random() * duration)
        exports = [copied_run / "exports" / name for name in names]
        assert all((path / MANIFEST).is_file() and first_change(path) is None for path in exports)
    assert qmixlora("export", copied_run, *EXPORT).code == 0
    assert sorted(path.name for path in (copied_run / "exports").iterdir()) == names  # nothing is left beside them
    for file in sorted((straight / "exports").rglob("*.safetensors")):
        assert same(copied_run / file.relative_to(straight), file), file.name


@pytest.mark.exhaustive
def test_two_thousand_steps_take_no_more_memory_than_the_first(
    make_recipe: Callable[..., Recipe], monkeypatch: pytest.MonkeyPatch
) -> None:
    resident: dict[int, int] = {}
    on_step_end = FiniteParameters.on_step_end

    def noted(callback: FiniteParameters, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step % (GROWTH // 20) == 0:
            resident[state.global_step] = psutil.Process().memory_info().rss
        on_step_end(callback, args, state, control, **kwargs)

    monkeypatch.setattr(FiniteParameters, "on_step_end", noted)
    spec = {"max_steps": GROWTH, "micro_batch_size": 1, "save_every": GROWTH // 4}
    train(make_recipe(train=spec), console=Console(quiet=True))
    assert resident[GROWTH] - resident[GROWTH // 4] < 32 * 2**20
