"""How often a micro-batch makes the host wait for the card: counted on a pretended one that sees all kinds of waits."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from qmixlora.recipe import Recipe
from qmixlora.training.recovery import StepStart
from tests.pretended_cuda import CUDA, PretendedCuda, on_card, put
from tests.unit.mixlora.conversations import conversation

from .helpers import rows_of
from .waits import waits_of

ALLOWED = 6
# whether an image has as many tokens as features, and whether anything is padded
CHECKS = {"transformers.models.llava.modeling_llava", "transformers.utils.import_utils"}
MASKS = {"transformers.masking_utils"}
ADAPTERS: list[dict[str, Any]] = [
    {},
    {"route_on": "all", "pairing": "released"},
    {"route_on": "instruction", "pairing": "conditional", "task_mix": 0.5},
    {"route_on": "instruction", "gate": "dense"},
    {"route_on": "task", "pairing": "tied"},
    {"method": "lora"},
]
MakeRecipe = Callable[..., Recipe]


def modules(cuda: PretendedCuda, phase: str) -> set[str]:
    return {wait.line.partition(":")[0] for wait in cuda.waits if wait.phase == phase}


@pytest.mark.parametrize("offload", [False, True], ids=["on-card", "offloaded"])
@pytest.mark.parametrize("adapter", ADAPTERS, ids=str)
def test_a_micro_batch_waits_six_times_at_most(
    make_recipe: MakeRecipe, data: Path, tmp_path: Path, adapter: dict[str, Any], offload: bool
) -> None:
    recipe = make_recipe(
        model={"offload_embeddings": offload}, adapter={"dropout": 0.1, **adapter}, train={"loss_chunk": 2}
    )
    cuda = waits_of(recipe, rows_of(data, 8), tmp_path)
    assert cuda.count() <= ALLOWED, cuda.table()
    assert not any(cuda.count(phase) for phase in ("batch", "between", "after")), cuda.table()
    assert sum(count for wait, count in cuda.waits.items() if wait.is_ours) == offload, cuda.table()


@pytest.mark.parametrize("adapter", ADAPTERS, ids=str)
def test_conversations_make_no_more_waits(make_recipe: MakeRecipe, tmp_path: Path, adapter: dict[str, Any]) -> None:
    recipe = make_recipe(adapter=adapter)
    rows = [conversation(recipe, *turns) for turns in [(0,), (1, 2), (0, 1, 2), (3, 2)]]
    cuda = waits_of(recipe, rows, tmp_path)
    assert cuda.count() <= ALLOWED, cuda.table()
    assert not any(wait.is_ours for wait in cuda.waits), cuda.table()


def test_what_still_waits_is_the_model(make_recipe: MakeRecipe, data: Path, tmp_path: Path) -> None:
    """And autograd, where the projector is trained: the gradient of image features is picked by a mask."""
    cuda = waits_of(make_recipe(), rows_of(data, 2), tmp_path / "trained")
    assert modules(cuda, "forward") == CHECKS | MASKS and cuda.count("forward") == 3, cuda.table()
    assert {wait.what for wait in cuda.waits if wait.phase == "backward"} == {"masked_select"}
    frozen = waits_of(make_recipe(adapter={"projector": "frozen"}), rows_of(data, 2), tmp_path / "frozen")
    assert frozen.count("backward") == 0, frozen.table()


def test_the_state_of_a_step_is_kept_by_one_copy() -> None:
    tensors = [torch.rand(3, 4, dtype=torch.float64), torch.rand(5), torch.rand(1, 2), torch.zeros(1)]
    put(tensors)
    before, cuda, start = [tensor.clone() for tensor in tensors], PretendedCuda(), StepStart(tensors)
    with cuda.pretended():
        start.on_step_begin(None, None, None)
        assert cuda.count() == 1 and not on_card(start.kept), cuda.table()
    for tensor in tensors:
        tensor.add_(1 / 3)
    assert start.rewind() and all(map(torch.equal, tensors, before))


def test_nothing_to_keep_is_no_copy() -> None:
    start = StepStart([])
    start.on_step_begin(None, None, None)
    assert start.rewind()


def card_tensor() -> Tensor:
    tensor = torch.tensor([3.0, 0.0, 2.0], requires_grad=True)
    put([tensor])
    return tensor


WAITING: dict[str, Callable[[Tensor], Any]] = {
    "item": lambda x: x[0].item(),
    "bool": lambda x: bool(x.any()),
    "float": lambda x: float(x.sum()),
    "tolist": lambda x: x.tolist(),
    "numpy": lambda x: x.detach().numpy(),
    "format": lambda x: f"{x.sum()}",
    "cpu": lambda x: x.cpu(),
    "to the host": lambda x: x.to("cpu", non_blocking=True),
    "to the card": lambda x: torch.ones(2).to(CUDA),
    "to where another is": lambda x: torch.ones(2).to(x),
    "copy_": lambda x: x.detach().copy_(torch.ones(3)),
    "a literal": lambda x: torch.tensor([1, 2], device=x.device),
    "nonzero": lambda x: x.nonzero(),
    "a mask as an index": lambda x: x[x > 0],
    "an index on the host": lambda x: x[torch.tensor([0, 2])],
    "masked_select": lambda x: x.masked_select(x > 0),
    "assigned by a mask": lambda x: x.detach().__setitem__(x > 0, 1.0),
    "unique": lambda x: x.unique(),
    "equal": lambda x: torch.equal(x, x * 1),
    "repeated as values say": lambda x: x.repeat_interleave(x.detach().long()),
    "check": lambda x: torch._check_tensor_all(x >= 0),
}


@pytest.mark.parametrize("work", WAITING.values(), ids=WAITING.keys())
def test_the_count_sees_every_kind_of_wait(work: Callable[[Tensor], Any]) -> None:
    x, cuda = card_tensor(), PretendedCuda()
    with cuda.pretended():
        work(x)
    assert cuda.count() == 1, cuda.table()
    with (on_host := PretendedCuda()).pretended():
        work(torch.tensor([3.0, 0.0, 2.0], requires_grad=True))
    assert on_host.count() == (work is WAITING["to the card"]), on_host.table()


LEAVING: dict[str, Callable[[Tensor], Any]] = {
    "to the card": lambda x: torch.ones(2).to(CUDA, non_blocking=True),
    "made there": lambda x: torch.zeros(2, device=x.device) + torch.arange(2, device=x.device),
    "index_select": lambda x: x.index_select(0, torch.tensor([2]).to(x.device, non_blocking=True)).sum().backward(),
    "a number of the host": lambda x: (x / torch.tensor(3.0)).sum().backward(),
    "a shape": lambda x: len(x) + x.numel() + x[:2].shape[0],
}


@pytest.mark.parametrize("work", LEAVING.values(), ids=LEAVING.keys())
def test_the_count_sees_no_wait_where_there_is_none(work: Callable[[Tensor], Any]) -> None:
    x, cuda = card_tensor(), PretendedCuda()
    with cuda.pretended():
        work(x)
    assert cuda.count() == 0, cuda.table()


IN_THE_BACKWARD_PASS: dict[str, Callable[[Tensor], Tensor]] = {
    "a mask as an index": lambda x: x[x > 0],
    "masked_scatter": lambda x: torch.zeros_like(x).masked_scatter(x > 0, x),
    "computed again": lambda x: checkpoint(lambda y: y.sum().item() * y.exp(), x, use_reentrant=False),
}


@pytest.mark.parametrize("work", IN_THE_BACKWARD_PASS.values(), ids=IN_THE_BACKWARD_PASS.keys())
def test_the_count_sees_waits_of_the_backward_pass(work: Callable[[Tensor], Tensor]) -> None:
    x, cuda = card_tensor(), PretendedCuda()
    with cuda.pretended():
        total = work(x).sum()
        cuda.phase = "backward"
        total.backward()
    assert cuda.count("backward") == 1, cuda.table()


def test_the_pretended_card_refuses_tensors_of_two_devices() -> None:
    x = card_tensor()
    with PretendedCuda().pretended():
        assert x.device == CUDA and (x * 2).is_cuda and not torch.ones(3).is_cuda
        with pytest.raises(RuntimeError, match="same device"):
            x + torch.ones(3)
