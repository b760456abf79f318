"""The smallest set of edits with which a recipe fits a card.

What single edits save is known by phase of the step. Their sum says which sets could fit; those are planned, the
smallest first.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial, reduce
from itertools import combinations, islice
from operator import or_
from typing import Any

from qmixlora.backbone.levers.table import Lever
from qmixlora.parallel import side_by_side, usable_cores
from qmixlora.recipe import Edit

from .planner import Plan, room_on

TRIES = 8  # sets that are planned; more would take longer than anyone waits


@dataclass(frozen=True)
class Option:
    """A lever's edit and the recipe's plan with it."""

    lever: Lever
    edit: Edit
    plan: Plan


@dataclass(frozen=True)
class Together:
    """Edits that are applied together, and the plan with all of them."""

    edit: Edit
    plan: Plan
    learns_the_same: bool

    def to_dict(self) -> dict[str, Any]:
        """The set in a plan's JSON, sizes in GiB."""
        told = self.plan.to_dict()
        sizes = {"peak_gib": told["peak_gib"], "margin_gib": told["margin_gib"]}
        return {"edit": str(self.edit), **sizes, "learns_the_same": self.learns_the_same}


def smallest_set(base: Plan, options: Sequence[Option], planned: Callable[[Edit], Plan | None]) -> Together | None:
    """The fewest options with which the recipe fits the card of `base`; of as many, those that change nothing of what
    is learned, then those that come first. None where no set was found. `planned` is told an edit of the recipe, and
    returns None where its values do not go together.
    """
    sets = islice(_promising(base, options), TRIES)
    while tried := list(islice(sets, usable_cores())):  # side by side: the second costs no time where the first fits
        plans = side_by_side([partial(_plan_of, chosen, planned) for chosen in tried])
        for chosen, plan in zip(tried, plans, strict=True):
            if plan is not None and plan.fits:
                return Together(_edit_of(chosen), plan, all(option.lever.learns_the_same for option in chosen))
    return None


def _edit_of(chosen: Sequence[Option]) -> Edit:
    return reduce(or_, (option.edit for option in chosen))


def _plan_of(chosen: Sequence[Option], planned: Callable[[Edit], Plan | None]) -> Plan | None:
    return chosen[0].plan if len(chosen) == 1 else planned(_edit_of(chosen))


def _promising(base: Plan, options: Sequence[Option]) -> Iterator[tuple[Option, ...]]:
    """Sets whose savings add up to enough, in the order in which they are to be tried; of a lever one step each."""
    assert base.card is not None
    room = room_on(base.card)
    for size in range(1, len(options) + 1):
        sets = [
            chosen
            for chosen in combinations(options, size)
            if len({option.lever.key for option in chosen}) == size and _estimated(base, chosen) <= room
        ]
        yield from sorted(sets, key=lambda chosen: sum(not option.lever.learns_the_same for option in chosen))


def _estimated(base: Plan, chosen: Sequence[Option]) -> int:
    """The peak with some options, if what each saves in a phase adds up."""
    return max(
        size - sum(size - _in_phase(option.plan, phase) for option in chosen) for phase, size in _phases(base).items()
    )


def _phases(plan: Plan) -> Mapping[str, int]:
    return {**plan.phases, "loading": plan.loading.card}


def _in_phase(plan: Plan, phase: str) -> int:
    return _phases(plan).get(phase, plan.peak)
