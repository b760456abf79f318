"""The account of a step: the bytes that are alive, and the most that ever were, by phase of the step."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

from .allocator import Allocator


class Peak(NamedTuple):
    """The most bytes that were alive in a phase, and the operation that took the last of them."""

    size: int
    operation: str


class Event(NamedTuple):
    """A storage taken, by its key, its size and the operation; or given back, where there is no size."""

    key: int
    size: int | None
    operation: str


class Held(NamedTuple):
    """Bytes alive on the card, and bytes that went to host memory."""

    live: int
    offloaded: int


class Account:
    """Bytes taken and given back, in blocks of torch's CUDA allocator.

    `peaks` holds the peak of every phase of the step, by its name and the edges that were crossed before; `edges` what
    was held at each (see `depth`); `saved` the bytes alive between the forward and the backward pass, `offloaded` those
    that went to host memory, `selected` those of the gates of all layers, where they are selected before the first.
    """

    def __init__(self) -> None:
        self.allocator = Allocator()
        self.peaks: dict[tuple[str, int], Peak] = {}
        self.edges: list[Held] = []
        self.live = self.saved = self.offloaded = self.selected = 0
        self._events: list[Event] | None = None
        self.begin("before the decoder")

    @property
    def peak(self) -> int:
        """The most bytes alive in any phase."""
        return max(peak.size for peak in self.peaks.values())

    @property
    def gaps(self) -> int:
        """The bytes that the allocator reserved beyond the peak."""
        return self.allocator.reserved - self.peak

    def begin(self, phase: str) -> None:
        """Begin a phase of the step, or go back to one."""
        self.phase = phase, len(self.edges)
        if self.phase not in self.peaks or self.live >= self.peaks[self.phase].size:
            self.peaks[self.phase] = Peak(self.live, "")

    def cross(self, edge: int) -> None:
        """Note what is held at an edge, if it is the next one: recomputation comes to earlier ones again."""
        if edge == len(self.edges):
            self.edges.append(Held(self.live, self.offloaded))

    def take(self, key: int, size: int, operation: Any) -> None:
        """Enter a storage."""
        self.live += self.allocator.take(key, size)
        if self.live > self.peaks[self.phase].size:
            self.peaks[self.phase] = Peak(self.live, str(operation))
        if self._events is not None:
            self._events.append(Event(key, size, str(operation)))

    def give_back(self, key: int) -> None:
        """Strike out a storage."""
        self.live -= self.allocator.give_back(key)
        if self._events is not None:
            self._events.append(Event(key, None, ""))

    @contextmanager
    def watched(self) -> Iterator[list[Event]]:
        """The list that the events of this block are added to."""
        assert self._events is None, "one block at a time is watched"
        events: list[Event] = []
        self._events = events
        try:
            yield events
        finally:
            self._events = None

    def forward_is_over(self) -> None:
        """Note the bytes that the forward pass has left, and begin the backward pass."""
        self.saved = self.live
        self.begin("backward, before the last layer")
