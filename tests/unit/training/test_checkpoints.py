"""Checkpoints are whole or left out, and the older one stays until the newer one is whole."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from transformers import TrainerCallback

from qmixlora.manifest import first_change, promise
from qmixlora.recipe import Recipe
from qmixlora.training import train
from qmixlora.training.checkpoints import (
    STATE,
    SealedCheckpoints,
    damage,
    last_checkpoint,
    remove_old_checkpoints,
)

from .helpers import QUIET


def steps(folder: Path) -> list[int]:
    return sorted(int(path.name.partition("-")[2]) for path in folder.glob("checkpoint-*"))


def test_every_checkpoint_is_sealed_and_the_newest_are_kept(make_recipe: Callable[..., Recipe]) -> None:
    recipe = make_recipe(train={"save_every": 1, "keep_checkpoints": 2, "max_steps": 4})
    folder = train(recipe, console=QUIET) / "checkpoints"
    assert steps(folder) == [3, 4]
    assert all(first_change(path) is None for path in folder.iterdir())


def test_the_older_checkpoint_stays_until_the_newer_is_whole(
    make_recipe: Callable[..., Recipe], monkeypatch: pytest.MonkeyPatch
) -> None:
    """As a crash between the Trainer's own files and the last callback would find them."""
    seen: list[tuple[int, list[int], str | None]] = []

    class Watch(TrainerCallback):
        def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            folder = Path(args.output_dir)
            seen.append((state.global_step, steps(folder), damage(folder / f"checkpoint-{state.global_step}")))

    right = SealedCheckpoints.on_save

    def on_save(self: SealedCheckpoints, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        Watch().on_save(args, state, control)
        right(self, args, state, control)

    monkeypatch.setattr(SealedCheckpoints, "on_save", on_save)
    train(make_recipe(train={"save_every": 2, "keep_checkpoints": 1}), console=QUIET)
    assert seen == [(2, [2], "it was never finished"), (4, [2, 4], "it was never finished")]


@pytest.fixture
def checkpoints(tmp_path: Path) -> Path:
    """Those of the steps 2, 4, 6, 8; that of step 6 was never finished."""
    for step in (2, 4, 6, 8):
        folder = tmp_path / "checkpoints" / f"checkpoint-{step}"
        folder.mkdir(parents=True)
        if step != 6:
            (folder / STATE).touch()
    return tmp_path / "checkpoints"


@pytest.mark.parametrize(("step", "keep", "left"), [(8, 1, [8]), (8, 2, [4, 8]), (4, 1, [4, 6, 8]), (7, 1, [4, 8])])
def test_what_was_never_finished_takes_nobodys_place(checkpoints: Path, step: int, keep: int, left: list[int]) -> None:
    remove_old_checkpoints(checkpoints, keep, step)
    assert steps(checkpoints) == left


def test_other_folders_are_no_checkpoints(tmp_path: Path) -> None:
    (tmp_path / "checkpoints" / "checkpoint-best").mkdir(parents=True)
    (tmp_path / "checkpoints" / "checkpoint-3").touch()
    (tmp_path / "checkpoints" / ".DS_Store").touch()
    assert last_checkpoint(tmp_path) is None
    remove_old_checkpoints(tmp_path / "checkpoints", 1, 9)
    assert (tmp_path / "checkpoints" / "checkpoint-best").is_dir()


def test_a_checkpoint_of_an_interrupted_save_is_told(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "checkpoints" / "checkpoint-3").mkdir(parents=True)
    promise(tmp_path / "checkpoints" / "checkpoint-3")
    assert last_checkpoint(tmp_path) is None
    assert "checkpoint-3 is left out: it was never finished." in capsys.readouterr().err
