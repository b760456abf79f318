"""Errors that the user can fix. One class, one message: what is wrong, where, and how to fix it."""

from __future__ import annotations


class UserError(Exception):
    """A mistake that the user can fix; the command line prints it without a traceback and exits with 2.

    `what` is one sentence; `where` a file, line, key or flag; `fix` what to do about it.
    """

    exit_code = 2

    def __init__(self, what: str, *, where: str = "", fix: str = "") -> None:
        self.what, self.where, self.fix = what, where, fix
        super().__init__(
            "\n".join(part for part in (what, where and f"  where: {where}", fix and f"  fix:   {fix}") if part)
        )


class CheckError(UserError):
    """A check that the user asked for failed, with input that is right; the command line exits with 1."""

    exit_code = 1
