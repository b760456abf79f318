"""The account of a step: what is alive, and the most that ever was, by stretch of the step."""

from __future__ import annotations

from typing import Any

from .allocator import Allocator


class Account:
    """Bytes taken and given back, in blocks of torch's CUDA allocator.

    `peaks` holds the most that was alive in every stretch of the step, `places` the operation that took it, `saved`
    what was alive between the forward and the backward pass, `offloaded` what went to host memory.
    """

    def __init__(self) -> None:
        self.allocator = Allocator()
        self.peaks: dict[str, int] = {}
        self.places: dict[str, str] = {}
        self.live = self.saved = self.offloaded = 0
        self.begin("before the decoder")

    @property
    def peak(self) -> int:
        return max(self.peaks.values())

    @property
    def gaps(self) -> int:
        """What the allocator reserved beyond the peak."""
        return self.allocator.reserved - self.peak

    def begin(self, stretch: str) -> None:
        """From here on the step is in this stretch (again)."""
        self.stretch = stretch
        if self.live >= self.peaks.get(stretch, 0):
            self._mark("")

    def take(self, key: int, size: int, operation: Any) -> None:
        self.live += self.allocator.take(key, size)
        if self.live > self.peaks[self.stretch]:
            self._mark(str(operation))

    def give_back(self, key: int) -> None:
        self.live -= self.allocator.give_back(key)

    def forward_is_over(self) -> None:
        self.saved = self.live
        self.begin("backward, before the last layer")

    def _mark(self, operation: str) -> None:
        self.peaks[self.stretch], self.places[self.stretch] = self.live, operation
