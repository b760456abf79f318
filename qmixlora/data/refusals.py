"""Samples that cannot be used: all of them counted, by reason too, and listed: few one by one, many by reason."""

from __future__ import annotations

import re
import sys
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field

from qmixlora.errors import UserError

LISTED = 10
REASONS = 50  # that are told apart
OTHER = "other reasons"
NUMBER = re.compile(r"\d[\d,.]*(?<=\d)")


class PictureError(UserError):
    """A picture that is missing or cannot be read: the same row may be right at the next start."""


@dataclass
class Refusals:
    """How many samples were refused, over their `pictures` among them; the first `LISTED` as (where, what); and for
    each reason, which is `what` with its numbers left out, how many, and the first one's place. `doubts`: what is
    likely a mistake in the others.
    """

    count: int = 0
    pictures: int = 0
    first: list[list[str]] = field(default_factory=list)
    reasons: dict[str, int] = field(default_factory=dict)
    places: dict[str, str] = field(default_factory=dict)
    doubts: list[str] = field(default_factory=list)

    def add(self, refusal: UserError) -> None:
        """Count one more."""
        self.count += 1
        self.pictures += isinstance(refusal, PictureError)
        if len(self.first) < LISTED:
            self.first.append([refusal.where, refusal.what])
        self._count_reason(NUMBER.sub("N", refusal.what), 1, refusal.where)

    @classmethod
    def of_all(cls, parts: Iterable[Refusals]) -> Refusals:
        """Those of several, in their order."""
        whole = cls()
        for part in parts:
            whole.count += part.count
            whole.pictures += part.pictures
            whole.doubts += part.doubts
            whole.first = [*whole.first, *part.first][:LISTED]
            for reason, count in part.reasons.items():
                whole._count_reason(reason, count, part.places[reason])
        return whole

    def _count_reason(self, reason: str, count: int, place: str) -> None:
        told = reason if reason in self.reasons or len(self.reasons) < REASONS else OTHER
        self.reasons[told] = self.reasons.get(told, 0) + count
        self.places.setdefault(told, place)

    def listed(self) -> str:
        """One line for each; of more than `LISTED`, one for each reason with its count and first place, most first."""
        if self.count <= LISTED:
            return "\n".join(f"    {where}: {what}" for where, what in self.first)
        common = Counter(self.reasons).most_common(LISTED)
        lines = [f"    {count} x {reason} First: {self.places[reason]}" for reason, count in common]
        more = self.count - sum(count for _, count in common)
        return "\n".join([*lines, *([f"    and {more} more"] if more else [])])

    def say(self, source: str, total: int) -> None:
        """Say on stderr how many of `total` samples were left out, if any were, and why."""
        if not self.count:
            return
        print(f"{source}: {self.count} of {total} samples left out:", file=sys.stderr)
        print(self.listed(), file=sys.stderr)

    def error(self, source: str, *, any_left: bool = True) -> UserError:
        """The refused samples as a mistake of the user; `any_left` is whether others could be used without them."""
        leave = ", or leave such samples out with data.on_bad_sample: skip." if any_left else "; there are no others."
        if self.count == 1:
            [(where, what)] = self.first
            return UserError(what, where=where, fix=f"Correct it{leave}")
        what = f"{self.count} samples cannot be used:\n{self.listed()}"
        return UserError(what, where=source, fix=f"Correct them{leave}")
