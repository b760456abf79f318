"""Frozen blocks are simulated once; what is replayed is what a simulation would have been."""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from qmixlora.memory import plan
from qmixlora.memory.simulation import replay, step
from qmixlora.memory.simulation.account import Account
from qmixlora.memory.simulation.replay import blocks_in, replaying
from qmixlora.memory.simulation.simulation import simulated

from ..helpers import LLAVA_7B, QWEN_7B, recipe_of

META = torch.device("meta")


@pytest.fixture(autouse=True)
def nothing_recorded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(replay, "_RECORDED", {})


class Block(nn.Module):
    """Counts its own passes. With `keeps`, something of a pass stays in it."""

    def __init__(self, width: int = 64, keeps: bool = False) -> None:
        super().__init__()
        self.linear = nn.Linear(width, width, device=META).requires_grad_(False)
        self.keeps = keeps
        self.passes: list[Tensor | None] = []

    def forward(self, x: Tensor) -> Tensor:
        wide = torch.cat([self.linear(x)] * 3)
        self.passes.append(wide if self.keeps else None)
        return wide[: len(x)].clone()


def run(blocks: list[Block], rows: int = 8, width: int = 64) -> Account:
    account, x = Account(), torch.empty(rows, width, device=META)
    held = [x, *(p for block in blocks for p in block.parameters())]
    with simulated(held, account) as storages, replaying(blocks, storages):
        for block in blocks:
            x = block(x)
    return account


LONG = (QWEN_7B, "google/gemma-3-4b-it")


@pytest.mark.parametrize(
    "model", [LLAVA_7B, "Qwen/Qwen3-VL-2B-Instruct", *(pytest.param(name, marks=pytest.mark.long) for name in LONG)]
)
def test_a_plan_with_replayed_blocks_is_the_plan(model: str, monkeypatch: pytest.MonkeyPatch) -> None:
    recipe, tokens = recipe_of(model), 1100
    first, again = plan(recipe, tokens=tokens), plan(recipe, tokens=tokens)
    assert replay._RECORDED
    monkeypatch.setattr(step, "replaying", lambda *_: nullcontext())
    alone = plan(recipe, tokens=tokens)
    assert first.phases == again.phases == alone.phases and first.parts == again.parts == alone.parts


def test_blocks_that_are_alike_are_simulated_once() -> None:
    blocks = [Block(), Block(), Block()]
    account = run(blocks)
    assert [len(block.passes) for block in blocks] == [1, 0, 0]
    assert account.live == 0 and account.peak == run([Block()]).peak + 8 * 64 * 4


@pytest.mark.parametrize(("other", "given"), [(Block(128), {"width": 128}), (Block(), {"rows": 9})])
def test_other_shapes_are_simulated_anew(other: Block, given: dict[str, Any]) -> None:
    run([Block()])
    other.passes.clear()
    run([other], **given)
    assert len(other.passes) == 1


def test_a_block_that_is_trained_is_not_replayed() -> None:
    blocks = [Block(), Block()]
    for block in blocks:
        block.linear.requires_grad_(True)
    run(blocks)
    assert [len(block.passes) for block in blocks] == [1, 1]


def test_a_block_that_keeps_something_is_not_replayed() -> None:
    blocks = [Block(keeps=True), Block(keeps=True)]
    account = run(blocks)
    assert [len(block.passes) for block in blocks] == [1, 1] and account.live == 2 * 3 * 8 * 64 * 4


def test_a_modules_forward_is_its_own_again_afterwards() -> None:
    blocks = [Block()]
    run(blocks)
    assert "forward" not in vars(blocks[0])


def test_blocks_are_the_members_of_the_outer_lists() -> None:
    inner = nn.ModuleList([nn.Linear(2, 2)])
    outer = nn.ModuleList([nn.Sequential(inner), nn.Linear(2, 2)])
    assert blocks_in([nn.Sequential(nn.Linear(2, 2), outer)]) == list(outer)
