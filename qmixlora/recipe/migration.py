"""Keys of earlier releases, and what they are now."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from qmixlora.errors import UserError


@dataclass(frozen=True)
class Renamed:
    """A key that an earlier release had: the key of today, and today's value for each of its own."""

    old: str
    new: str
    values: Mapping[Any, Any]


RENAMED = (Renamed("adapter.train_projector", "adapter.projector", {True: "full", False: "frozen"}),)


@dataclass(frozen=True)
class Removed:
    """A key that an earlier release had: the value that is always taken now, and what to do in place of others."""

    old: str
    value: Any
    fix: str


REMOVED = (
    Removed(
        "adapter.temperature",
        1.0,
        "Remove it, and begin a new run: 0.5 was within the noise of 1 (docs/results.md).",
    ),
)


@dataclass(frozen=True)
class RemovedValue:
    """A value that a key had in an earlier release, and what to do in its place."""

    key: str
    value: str
    fix: str


REMOVED_VALUES = (
    RemovedValue("adapter.pairing", "independent", "Take tied, which scored higher by 10 points."),
    RemovedValue("adapter.route_on", "prompt", "Take embedding, which scored higher by 6 points."),
)


def migrated(values: Mapping[str, Any]) -> tuple[dict[str, Any], list[str]]:
    """Values by their dotted paths with the keys of today, and a note on each that was renamed.

    A value that the earlier release did not know either stays where it is. Raises UserError where the old key and the
    new one contradict each other, for a value of a key that is there no longer, if it is not what is always done, and
    for a value that is gone.
    """
    now = dict(values)
    for gone in REMOVED_VALUES:
        if now.get(gone.key) == gone.value:
            raise UserError(
                f"{gone.key}: {gone.value}, a value of earlier releases, is gone.",
                where=gone.key,
                fix=f"{gone.fix} Runs that were trained with it open in release 0.1.",
            )
    notes = _remove(now)
    for key in RENAMED:
        old = now.get(key.old)
        if not isinstance(old, bool) or old not in key.values:
            continue
        new = key.values[now.pop(key.old)]
        if now.setdefault(key.new, new) != new:
            raise UserError(
                f"{key.old}: {str(old).lower()}, a key of earlier releases, and {key.new}: {now[key.new]} contradict "
                "each other.",
                where=key.old,
                fix=f"Remove {key.old}.",
            )
        notes.append(f"{key.old}: {str(old).lower()} is {key.new}: {new} now.")
    return now, notes


def _remove(values: dict[str, Any]) -> list[str]:
    """Take keys that are there no longer out of the values, in place; return a note on each. Raises as `migrated`."""
    notes = []
    for key in REMOVED:
        if key.old not in values:
            continue
        if (value := values.pop(key.old)) != key.value:
            raise UserError(f"{key.old}: {value}, a key of earlier releases, is gone.", where=key.old, fix=key.fix)
        notes.append(f"{key.old}: {value} is left out: it is always so now.")
    return notes


def migrate(sections: dict[str, Any]) -> list[str]:
    """Give a recipe's sections the keys of today, in place; return a note on each that was renamed.

    Raises UserError as `migrated`.
    """
    notes: list[str] = []
    for name, section in sections.items():
        if isinstance(section, dict):
            now, told = migrated({f"{name}.{key}": value for key, value in section.items()})
            sections[name] = {path.removeprefix(f"{name}."): value for path, value in now.items()}
            notes += told
    return notes
