"""The account of a step: storages, index tensors with values, attention, and what torch's allocator makes of it."""

from __future__ import annotations

import bitsandbytes as bnb
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from qmixlora.backbone import nf4_linear
from qmixlora.memory.simulation.allocator import PAGES, Allocator
from qmixlora.memory.simulation.attention import fused_attention
from qmixlora.memory.simulation.simulation import LiveStorages


def test_attention_never_holds_the_square() -> None:
    query = torch.empty(2, 4, 512, 32, device="meta", requires_grad=True)
    with LiveStorages([query]) as storages:
        out, _ = fused_attention(nn.Identity(), query, query, query, None)
        out.sum().backward()
    assert out.shape == (2, 512, 4, 32) and query.grad is not None and query.grad.shape == query.shape
    assert storages.account.peak < 2 * 4 * 512 * 512 * 4


def test_index_tensors_keep_their_values() -> None:
    states = torch.empty(3, 7, device="meta")
    with LiveStorages([states]) as storages:
        mask = (torch.arange(3) != 1).to("meta")
        assert states[mask].shape == (2, 7) and mask.nonzero().shape == (2, 1) and int(mask.sum()) == 2
        with pytest.raises(RuntimeError, match="cannot be planned"):
            float(states.sum())
        del mask
    assert storages.account.live < 3 * 512


def test_a_layer_without_storage_has_the_bytes_of_a_real_one() -> None:
    real = bnb.nn.Linear4bit(256, 320, bias=False, quant_type="nf4", compute_dtype=torch.bfloat16)
    real.weight = bnb.nn.Params4bit(torch.randn(320, 256), requires_grad=False, quant_type="nf4").to("cpu")
    made = nf4_linear(torch.empty(320, 256, dtype=torch.bfloat16, device="meta"), None, torch.device("meta"))
    one, two = real.weight.quant_state, made.weight.quant_state
    assert made.weight.shape == real.weight.shape and two.absmax.shape == one.absmax.shape
    assert two.state2.absmax.shape == one.state2.absmax.shape and two.shape == one.shape
    assert made(torch.empty(2, 256, dtype=torch.bfloat16, device="meta")).shape == (2, 320)


def test_what_shares_a_storage_counts_once_even_when_it_is_made_again() -> None:
    """`mm` of three dimensions ends in `_unsafe_view`, which does not say that it is a view."""
    states, weight = torch.empty(2, 64, 128, device="meta"), torch.empty(128, 256, device="meta")
    with LiveStorages([states, weight]) as storages:
        for _ in range(2):  # the second time from memory
            out = states @ weight
            assert storages.account.live == out.nbytes == 2 * 64 * 256 * 4
            del out
    assert storages.account.live == 0 and storages.account.peak == 2 * 64 * 256 * 4


def test_what_goes_to_the_host_leaves_the_card_and_is_counted_there() -> None:
    states = torch.empty(2, 64, 128, device="meta")
    with LiveStorages([]) as storages:
        made = states * 2
        kept = made.cpu()
        del made
        assert storages.account.live == 0 and storages.account.offloaded == kept.nbytes
        back = kept.to("meta")
    assert storages.account.live == back.nbytes == kept.nbytes


SIZES = st.sampled_from([1, 100, 700, 5000, 900_000, 2**20, 2**20 + 1, 3 * 2**20, 30 * 2**20])


@settings(max_examples=60, deadline=None)
@given(st.lists(st.tuples(SIZES, st.integers(0, 20)), max_size=80))
def test_the_allocators_blocks_never_overlap_and_fill_its_segments(steps: list[tuple[int, int]]) -> None:
    allocator, live = Allocator(), list[int]()
    for key, (size, victim) in enumerate(steps):
        if victim < len(live):
            allocator.give_back(live.pop(victim))
        allocator.take(key, size)
        live.append(key)
        for small, segment in allocator.segments.items():
            taken = [(start, start + size) for kind, start, size in allocator.blocks.values() if kind == small]
            free = [(start, start + size) for start, size in segment.starts.items()]
            end = 0
            for start, stop in sorted(taken + free):
                assert start == end
                end = stop
            assert end == segment.mapped and segment.mapped % PAGES[small] == 0
            assert not {stop for _, stop in free} & {start for start, _ in free}  # neighbours are joined


def test_the_allocator_fills_a_gap_before_it_grows() -> None:
    allocator = Allocator()
    for key, size in enumerate((8, 8, 8)):
        allocator.take(key, size * 2**20)
    assert allocator.reserved == 40 * 2**20  # two pages of 20 MiB
    allocator.give_back(1)
    allocator.take(3, 6 * 2**20)
    assert allocator.reserved == 40 * 2**20
    allocator.take(4, 30 * 2**20)
    assert allocator.reserved == 60 * 2**20  # the free end of the segment grows
