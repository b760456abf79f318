"""Samples that cannot be read: all of them counted, the first ones kept and listed."""

from __future__ import annotations

import sys
from dataclasses import dataclass, field

from qmixlora.errors import UserError

LISTED = 10


class PictureError(UserError):
    """A picture that is missing or cannot be read: the same row may be right at the next start."""


@dataclass
class Refusals:
    """How many samples were refused, over their `pictures` among them, and the first `LISTED` as (where, what)."""

    count: int = 0
    pictures: int = 0
    first: list[list[str]] = field(default_factory=list)

    def add(self, refusal: UserError) -> None:
        """Count one more."""
        self.count += 1
        self.pictures += isinstance(refusal, PictureError)
        if len(self.first) < LISTED:
            self.first.append([refusal.where, refusal.what])

    def listed(self) -> str:
        """One line for each of the first, and how many more there are."""
        lines = [f"    {where}: {what}" for where, what in self.first]
        more = self.count - len(self.first)
        return "\n".join([*lines, *([f"    and {more} more"] if more else [])])

    def say(self, source: str, total: int) -> None:
        """Say on stderr how many of `total` samples were left out, if any were, and why."""
        if self.count:
            print(f"{source}: {self.count} of {total} samples left out:", file=sys.stderr)
            print(self.listed(), file=sys.stderr)

    def error(self, source: str) -> UserError:
        """The refused samples as a mistake of the user."""
        leave = "or leave such samples out with data.on_bad_sample: skip."
        if self.count == 1:
            [(where, what)] = self.first
            return UserError(what, where=where, fix=f"Correct it, {leave}")
        what = f"{self.count} samples cannot be used:\n{self.listed()}"
        return UserError(what, where=source, fix=f"Correct them, {leave}")
