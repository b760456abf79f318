"""Errors that the user can fix. One class, one message: what is wrong, where, and how to fix it."""

from __future__ import annotations

import difflib
import os
import re
import shlex
from collections.abc import Iterable, Sequence
from pathlib import Path

SECRETS = (  # as they stand in texts; of each match, the first group stays
    re.compile(r"()\bhf_[A-Za-z0-9]{16,}"),  # a token of the Hugging Face hub
    re.compile(r"([a-z][a-z0-9+.-]*://)[^/\s@]+(?=@)", re.IGNORECASE),  # the user and the password of an address
    re.compile(r"([?&](?:[\w-]*token|[\w-]*signature|[\w-]*key|[\w-]*secret|password)=)[^&\s'\"]+", re.IGNORECASE),
    re.compile(r"(\bBearer\s+)[A-Za-z0-9._~+/-]{8,}", re.IGNORECASE),
)
VARIABLES = ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN", "HUGGINGFACE_HUB_TOKEN")


def without_secrets(text: str) -> str:
    """A text with tokens and passwords in it replaced by `***`."""
    for variable in VARIABLES:
        if len(value := os.environ.get(variable, "").strip()) >= 8:
            text = text.replace(value, "***")
    for secret in SECRETS:
        text = secret.sub(r"\1***", text)
    return text


def path_meant(path: Path) -> str:
    """A sentence that names what lies beside a path that is not there and is called much like it, or nothing."""
    try:
        names = [other.name for other in path.parent.iterdir()]
    except (OSError, ValueError):  # no folder, or none that may be read: the error that asks is the one to tell
        names = []
    close = difflib.get_close_matches(path.name, names, n=1, cutoff=0.6)
    return f"Did you mean {path.parent / close[0]}?" if close else ""


def did_you_mean(word: str, known: Iterable[str], cutoff: float = 0.5) -> str:
    """A sentence, after another one, that names the nearest known word, or nothing; `cutoff` as difflib has it."""
    close = difflib.get_close_matches(word, list(known), n=1, cutoff=cutoff)
    return f" Did you mean {close[0]!r}?" if close else ""


def some(names: Sequence[str], most: int, between: str = ", ") -> str:
    """The first of many names, in a row, and how many more there are."""
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return between.join(names[:most]) + more


def typed(*words: str | Path | int, program: str = "qmixlora") -> str:
    """A command as one types it in a shell: a folder may have spaces in its name."""
    return shlex.join([program, *map(str, words)])


class UserError(Exception):
    """A mistake that the user can fix; the command line prints it without a traceback and exits with 2.

    `what` is one sentence; `where` a file, line, key or flag; `fix` what to do about it. Tokens and passwords are taken
    out of all three.
    """

    exit_code = 2

    def __init__(self, what: str, *, where: str = "", fix: str = "") -> None:
        what, where, fix = map(without_secrets, (what, where, fix))
        self.what, self.where, self.fix = what, where, fix
        super().__init__(
            "\n".join(part for part in (what, where and f"  where: {where}", fix and f"  fix:   {fix}") if part)
        )


class CheckError(UserError):
    """A check that the user asked for failed, with input that is right; the command line exits with 1."""

    exit_code = 1
