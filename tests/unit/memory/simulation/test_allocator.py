"""torch's CUDA allocator: blocks in segments that grow."""

from __future__ import annotations

from hypothesis import given, settings
from hypothesis import strategies as st

from qmixlora.memory.simulation.allocator import PAGES, Allocator

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
