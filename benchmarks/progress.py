"""How far a run is, in its log; and the end of one that cannot end in time."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from transformers import TrainerCallback

TOLD = 10  # times in a phase
JUDGED = 0.05  # the share of a phase after which its pace is known


class OutOfTimeError(Exception):
    """A phase would end after the deadline."""


@dataclass
class Phase:
    """A part of a run, of so many steps or samples: told of progress, it says so, with the minutes that are left.

    Raises OutOfTimeError where it would end after `deadline` (on `clock`), once its pace is known.
    """

    name: str
    total: int
    deadline: float = float("inf")
    say: Callable[[str], None] = print
    clock: Callable[[], float] = time.monotonic
    said: int = field(default=0, init=False)
    start: float = field(init=False)

    def __post_init__(self) -> None:
        self.start = self.clock()

    def __call__(self, done: int) -> None:
        if done < JUDGED * self.total:
            return
        now = self.clock()
        left = (now - self.start) / done * (self.total - done)
        if now + left > self.deadline:
            raise OutOfTimeError(
                f"{self.name}: {left / 60:.0f} min more are needed, {(self.deadline - now) / 60:.0f} are left"
            )
        if done * TOLD // self.total > self.said:
            self.said = done * TOLD // self.total
            self.say(f"  {self.name} {done}/{self.total}, {left / 60:.1f} min left")


class Steps(TrainerCallback):
    """Tells a phase of a trainer's steps, which come after `before` others."""

    def __init__(self, phase: Phase, before: int = 0) -> None:
        self.phase, self.before = phase, before

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.phase(self.before + state.global_step)
