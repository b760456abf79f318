"""What a step costs does not grow with the number of tasks: counted in numbers that are copied or computed."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from qmixlora.mixlora.running_means import update_means
from qmixlora.training.recovery import StepStart

FEW, MANY = 10, 3000


class Sizes(TorchDispatchMode):
    """The largest tensor that an operation makes, in numbers; one that is changed in place is not made."""

    largest = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        given = {id(leaf) for leaf in tree_leaves((args, kwargs))}
        made = [leaf for leaf in tree_leaves(result) if isinstance(leaf, Tensor) and id(leaf) not in given]
        self.largest = max([self.largest, *(tensor.numel() for tensor in made if tensor._base is None)])
        return result


def of_a_step(tasks: int) -> int:
    """The numbers that the beginning of a step of two tasks copies."""
    sums, counts, center = torch.rand(2, tasks, 4, 4), torch.rand(tasks), torch.rand(3)
    names = [f"task {index}" for index in range(tasks)]
    start = StepStart([center], [(sums, 1), (counts, 0)], names)
    with Sizes() as sizes:
        start.announce(["task 3", "task 7", "task 3"])
        start.on_step_begin(None, None, None)
    return sizes.largest


def test_the_beginning_of_a_step_copies_its_own_tasks_alone() -> None:
    assert of_a_step(MANY) == of_a_step(FEW) == 3 + 2 * 2 * 4 * 4 + 2


def test_what_a_step_added_to_its_tasks_is_undone_to_the_bit() -> None:
    sums, counts, center = torch.rand(2, 9, 4, 4, dtype=torch.float64), torch.rand(9).double(), torch.rand(3)
    before = [tensor.clone() for tensor in (sums, counts, center)]
    start = StepStart([center], [(sums, 1), (counts, 0)], [str(index) for index in range(9)])
    start.announce(["8", "2"])
    start.on_step_begin(None, None, None)
    for index in (2, 8):
        sums[:, index] += 1 / 3
        counts[index] += 1
    center += 1 / 3
    assert start.rewind() and all(map(torch.equal, (sums, counts, center), before))


def test_nothing_is_undone_between_steps() -> None:
    center = torch.zeros(1)
    start = StepStart([center])
    start.on_step_begin(None, None, None)
    start.on_step_end(None, None, None)
    center += 1
    start.restore()
    assert center == 1


def of_means(tasks: int) -> int:
    mean_TEF, count_T, values_BEF = torch.rand(tasks, 4, 4), torch.ones(tasks), torch.rand(3, 4, 4)
    with Sizes() as sizes:
        update_means(mean_TEF, count_T, values_BEF, torch.tensor([4, 4, -1]))
    return sizes.largest


def test_running_means_touch_the_tasks_of_the_batch_alone() -> None:
    assert of_means(MANY) == of_means(FEW) < 4 * FEW * 4 * 4


@pytest.mark.parametrize("ids", [[4, 4, -1], [0, -1, 0], [1, 2, 0], [-1, -1, -1]])
def test_running_means_are_those_of_each_tasks_samples(ids: list[int]) -> None:
    mean_TEF, count_T = torch.zeros(5, 2, 2), torch.zeros(5)
    batches = [torch.rand(3, 2, 2) for _ in range(4)]
    for values_BEF in batches:
        update_means(mean_TEF, count_T, values_BEF, torch.tensor(ids))
    for task in range(5):
        own = [values_BEF[index] for values_BEF in batches for index, id_ in enumerate(ids) if id_ == task]
        assert count_T[task] == len(own)
        torch.testing.assert_close(mean_TEF[task], torch.stack(own).mean(dim=0) if own else torch.zeros(2, 2))
