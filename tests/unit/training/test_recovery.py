"""What a failed step leaves: nothing of its own, and a checkpoint that can be trusted."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from qmixlora.out_of_memory import is_out_of_memory
from qmixlora.recipe import Recipe
from qmixlora.training import train, train_within_memory

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
