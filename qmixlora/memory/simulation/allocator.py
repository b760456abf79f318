"""torch's CUDA allocator: the memory that it reserves for a step, with its rounding and the gaps between blocks.

After `c10/cuda/CUDACachingAllocator.cpp` (torch 2.13) with `expandable_segments:True`, which `qmixlora train` sets: one
growing segment for blocks up to 1 MiB and one for larger ones, mapped by 2 and 20 MiB; best fit; every block is split;
free neighbours are joined; nothing is unmapped while there is room. Sizes and addresses in bytes.
"""

from __future__ import annotations

from bisect import bisect_left, insort

ROUND = 512  # every block is a multiple of this
SMALL = 2**20  # the largest block of the small segment
PAGES = {True: 2 * 2**20, False: 20 * 2**20}  # by whether the segment is the small one


class Segment:
    """One growing range of addresses, from which blocks are cut."""

    def __init__(self, page: int) -> None:
        self.page = page
        self.mapped = 0
        self.free: list[tuple[int, int]] = []  # (size, start), sorted
        self.starts: dict[int, int] = {}  # start -> size of free blocks
        self.ends: dict[int, int] = {}  # end -> start of free blocks

    def take(self, size: int) -> int:
        """The start of a block of this size."""
        fit = bisect_left(self.free, (size, 0))
        if fit == len(self.free):
            start = self.ends.get(self.mapped, self.mapped)  # a free block at the end grows
            grown = -(-(size - (self.mapped - start)) // self.page) * self.page
            if start < self.mapped:
                self._remove(start)
            self.mapped += grown
        else:
            start = self.free[fit][1]
        end = start + self._remove(start) if start in self.starts else self.mapped
        if end > start + size:
            self._add(start + size, end - start - size)
        return start

    def give_back(self, start: int, size: int) -> None:
        if start in self.ends:
            before = self.ends[start]
            size, start = size + self._remove(before), before
        if start + size in self.starts:
            size += self._remove(start + size)
        self._add(start, size)

    def _add(self, start: int, size: int) -> None:
        insort(self.free, (size, start))
        self.starts[start], self.ends[start + size] = size, start

    def _remove(self, start: int) -> int:
        size = self.starts.pop(start)
        del self.ends[start + size]
        del self.free[bisect_left(self.free, (size, start))]
        return size


class Allocator:
    """Blocks by key. `reserved` only grows, as long as the card has room."""

    def __init__(self) -> None:
        self.segments = {small: Segment(page) for small, page in PAGES.items()}
        self.blocks: dict[int, tuple[bool, int, int]] = {}  # key -> (small, start, size)

    @property
    def reserved(self) -> int:
        return sum(segment.mapped for segment in self.segments.values())

    def take(self, key: int, size: int) -> int:
        """Take a block for `size` bytes; return its real size."""
        size = -(-size // ROUND) * ROUND
        small = size <= SMALL
        self.blocks[key] = (small, self.segments[small].take(size) if size else 0, size)
        return size

    def give_back(self, key: int) -> int:
        """Frees a block; returns its size."""
        small, start, size = self.blocks.pop(key)
        if size:
            self.segments[small].give_back(start, size)
        return size
