"""Names of an export's folders: the tasks' own, as every file system can hold them, and no two alike."""

from __future__ import annotations

import hashlib
import math
import unicodedata
from collections.abc import Mapping, Sequence

KEPT = "._+-"  # beside letters, marks and digits of any script
WINDOWS = {"con", "prn", "aux", "nul", *(f"{port}{number}" for port in ("com", "lpt") for number in range(10))}
LONGEST = 120  # bytes; a name of 255 is the most, and the form, a process' number and dots come to it
ALL = "all"  # all tasks of a run together, each as much
ROUNDED = 3  # digits of a share in a name


def folder_names(tasks: Sequence[str]) -> dict[str, str]:
    """The folder's name of each task of a run: `safe_name`, with a digest of the task where that is not its own.

    Names that differ in case or in the spelling of a letter alone are the same folder on many systems.
    """
    alike: dict[str, list[str]] = {_key(ALL): [ALL]} if len(tasks) > 1 else {}
    for task in tasks:
        alike.setdefault(_key(safe_name(task)), []).append(task)
    taken = {task for same in alike.values() if len(same) > 1 for task in same}
    return {task: f"{safe_name(task)}-{_digest(task)}" if task in taken else safe_name(task) for task in tasks}


def mixture_name(shares: Mapping[str, float], tasks: Sequence[str]) -> str:
    """The folder's name of several of a run's tasks in these shares; other shares have another one.

    A digest of the shares goes with a name that does not tell them: rounded, cut, or with a `+` of a task's own.
    """
    names = folder_names(tasks)
    even = len(set(shares.values())) == 1
    if even and set(shares) == set(tasks) and len(tasks) > 1:
        return ALL
    ordered = [task for task in tasks if task in shares]
    name = "+".join(names[task] if even else f"{names[task]}={shares[task]:.{ROUNDED}g}" for task in ordered)
    told = even or all(math.isclose(share, round(share, ROUNDED), abs_tol=1e-9) for share in shares.values())
    taken = len(shares) > 1 and (_key(name) in map(_key, names.values()) or any("+" in names[task] for task in shares))
    if told and not taken and len(name.encode()) <= LONGEST:
        return name
    return f"{_cut(name)}-{_digest(repr([(task, shares[task]) for task in ordered]))}"


def safe_name(task: str) -> str:
    """A task's name as a folder's: composed letters (NFC), marks and digits of any script, `.`, `_`, `+` and `-` stay,
    the rest becomes `_`; neither hidden, nor an option of a command line, nor a device of Windows, nor too long.
    """
    composed = unicodedata.normalize("NFC", task)
    name = "".join(char if char in KEPT or unicodedata.category(char)[0] in "LMN" else "_" for char in composed)
    bare = name.lstrip(".")
    name = f"_{bare}" if bare != name or bare.startswith("-") or _key(name.partition(".")[0]) in WINDOWS else name
    name = f"{name.rstrip('.')}_" if name.endswith(".") else name
    return f"{_cut(name)}-{_digest(task)}" if len(name.encode()) > LONGEST else name or "_"


def _cut(name: str) -> str:
    return name.encode()[: LONGEST - 9].decode(errors="ignore")


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:8]


def _key(name: str) -> str:
    """What file systems that ignore case and composition tell names apart by."""
    return unicodedata.normalize("NFKC", unicodedata.normalize("NFKC", name).casefold())
