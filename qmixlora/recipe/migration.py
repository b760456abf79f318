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


def migrated(values: Mapping[str, Any]) -> tuple[dict[str, Any], list[str]]:
    """Values by their dotted paths with the keys of today, and a note on each that was renamed.

    A value that the earlier release did not know either stays where it is. Raises UserError where the old key and the
    new one contradict each other.
    """
    now, notes = dict(values), []
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
