"""What a failed step leaves: nothing of its own, and a checkpoint that can be trusted."""

from __future__ import annotations

import io
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from transformers import TrainerCallback

from qmixlora.errors import UserError
from qmixlora.out_of_memory import is_out_of_memory
from qmixlora.recipe import Recipe, edited
from qmixlora.training import SupervisedTrainer, run, train, train_within_memory

from .card import NOISY, Card, assert_equal, records, resumed_from, weights
from .helpers import QUIET


@pytest.mark.long
def test_an_optimizer_that_ran_out_of_memory_is_not_trusted(
    make_recipe: Callable[..., Recipe], tmp_path: Path, card: Card, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Half of its moments may be of the new step: the run goes on from the checkpoint before."""
    spec = {"max_steps": 6, "micro_batch_size": 8, "gradient_accumulation": 2, "save_every": 2, "keep_checkpoints": 9}
    plain = train(make_recipe(adapter=NOISY, train={**spec, "output": str(tmp_path / "plain")}), console=QUIET)
    smaller = make_recipe(adapter=NOISY, train={**spec, "micro_batch_size": 4, "gradient_accumulation": 4})
    expected = resumed_from(plain, 2, smaller, tmp_path / "expected")
    step, calls = torch.optim.AdamW.step, iter(range(99))

    def torn(optimizer: Any, *args: Any) -> Any:
        done = step(optimizer, *args)
        if next(calls) == 3:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 MiB.")
        return done

    monkeypatch.setattr(torch.optim.AdamW, "step", torn)
    folder = train_within_memory(make_recipe(adapter=NOISY, train=spec), console=QUIET)
    assert [r["step"] for r in records(folder) if "out_of_memory" in r] == [2]
    assert_equal(weights(folder), weights(expected))


def test_a_finished_run_is_not_trained_on(make_recipe: Callable[..., Recipe], card: Card) -> None:
    recipe = make_recipe(train={"save_every": 4})
    before = weights(train(recipe, console=QUIET))
    assert_equal(weights(train(recipe, resume=True, console=QUIET)), before)


def break_images(folder: Path) -> None:
    for path in {*folder.iterdir()} - {folder / "train-00000.png"}:  # which every start looks at
        path.write_bytes(path.read_bytes()[:-60])  # the header is whole


def raise_error(folder: Path) -> None:
    raise RuntimeError("a tracker's server is gone")


@pytest.mark.parametrize(
    ("fault", "message"),
    [
        (break_images, r"cannot be read[\s\S]*\.png \(named by .*line \d+, row \d+[\s\S]*check_images: full"),
        (raise_error, "a tracker's server is gone"),
    ],
)
def test_whatever_goes_wrong_the_steps_before_are_kept_and_the_run_goes_on_when_it_is_mended(
    make_recipe: Callable[..., Recipe],
    data: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    fault: Callable[[Path], None],
    message: str,
) -> None:
    own = shutil.copytree(data, tmp_path / "own")
    spec = {"max_steps": 6, "save_every": 4, "micro_batch_size": 2, "gradient_accumulation": 2}

    def recipe_of(name: str) -> Recipe:
        source, output = {"train": str(own / "train.json")}, {"output": str(tmp_path / name)}
        return make_recipe(adapter=NOISY, data=source, train={**spec, **output})

    straight, make_trainer = train(recipe_of("straight"), console=QUIET), run.make_trainer

    class AtStep3(TrainerCallback):
        def on_log(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            if state.global_step == 3:
                fault(own / "images")

    def made(*arguments: Any) -> SupervisedTrainer:
        trainer = make_trainer(*arguments)
        trainer.add_callback(AtStep3())
        return trainer

    monkeypatch.setattr(run, "make_trainer", made)
    told, folder = io.StringIO(), tmp_path / "broken"
    with pytest.raises((UserError, RuntimeError), match=message):
        train(recipe_of("broken"), console=Console(file=told))
    assert [path.name for path in (folder / "checkpoints").iterdir()] == ["checkpoint-3"]
    assert f"Step 3 of 6 is kept. Go on with: qmixlora train {folder} --resume\n" in told.getvalue()
    monkeypatch.setattr(run, "make_trainer", make_trainer)
    ended = shutil.copytree(folder, tmp_path / "ended")  # as is said of other rows: here, those that are whole
    train(edited(recipe_of("ended"), ["train.max_steps=3"]), resume=True, console=QUIET)
    others = make_recipe(adapter=NOISY, train={**spec, "output": str(tmp_path / "others")})
    train(others, init_from=ended, console=QUIET)
    shutil.rmtree(own)
    shutil.copytree(data, own)
    assert_equal(weights(train(recipe_of("broken"), resume=True, console=QUIET)), weights(straight))


MESSAGES = [
    (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has a total capacity of"), True),
    (RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"), True),
    (RuntimeError("CUDA error: out of memory\nCUDA kernel errors might be asynchronously reported"), True),
    (RuntimeError("[enforce fail at alloc_cpu.cpp:117] . DefaultCPUAllocator: can't allocate memory: you"), True),
    (MemoryError(), True),
    (RuntimeError("CUDA error: device-side assert triggered"), False),
    (RuntimeError("[Errno 28] No space left on device"), False),
    (ValueError("out of memory"), False),
]


@pytest.mark.parametrize(("error", "expected"), MESSAGES)
def test_what_counts_as_out_of_memory(error: BaseException, expected: bool) -> None:
    assert is_out_of_memory(error) is expected
