"""A run's folder has one owner at a time: a lock that dies with its process."""

from __future__ import annotations

import errno
import json
import os
import socket
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from datetime import datetime
from pathlib import Path

from qmixlora.errors import UserError

LOCK = ".lock"  # in the run's folder
NO_CONTENT = {LOCK, ".DS_Store", "Thumbs.db", "desktop.ini"}  # what file managers leave
FAR = 1 << 30  # the byte that Windows locks, beyond what others read

_held: set[int] = set()  # file descriptors of the locks of this process


def _forget_in_child() -> None:
    """A forked worker must not hold the lock when its parent has died."""
    while _held:
        os.close(_held.pop())


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forget_in_child)


def is_empty(folder: Path) -> bool:
    """Whether a folder is not there, or has no content of anybody's."""
    return not folder.exists() or (folder.is_dir() and all(path.name in NO_CONTENT for path in folder.iterdir()))


@contextmanager
def owned(folder: Path) -> Iterator[None]:
    """Own a run's folder in a block; it is made, and removed again if nothing has come into it.

    Where the file system has no locks, a warning says so.

    Raises:
        UserError: another process owns the folder, or it cannot be written.
    """
    made = [path for path in (folder, *folder.parents) if not path.exists()]
    try:
        folder.mkdir(parents=True, exist_ok=True)
        descriptor = _locked(folder)
    except OSError as error:
        _remove_empty(made)
        raise UserError(
            f"The run's folder cannot be written: {error.strerror or error}.",
            where=str(error.filename or folder),
            fix="Set train.output to a folder on a disk that can be written.",
        ) from None
    _held.add(descriptor)
    try:
        yield
    finally:
        _held.discard(descriptor)
        with suppress(OSError):
            (folder / LOCK).unlink()  # while it is held: who waits looks whether the file is still this one
        os.close(descriptor)
        _remove_empty(made)


def _locked(folder: Path) -> int:
    """The descriptor of the lock file, held. Raises UserError if another process holds it, and OSError."""
    while True:
        descriptor = os.open(folder / LOCK, os.O_RDWR | os.O_CREAT | getattr(os, "O_CLOEXEC", 0), 0o644)
        try:
            _lock(descriptor)
        except OSError as error:
            if error.errno not in (errno.EAGAIN, errno.EACCES, errno.EDEADLK):
                warnings.warn(
                    f"{folder} cannot be locked ({error.strerror}): see to it that no other run writes there.",
                    stacklevel=2,
                )
                return descriptor
            holder = _read(folder)
            os.close(descriptor)
            since = f", since {holder['since']}" if "since" in holder else ""
            process = f"process {holder.get('pid', '?')} on {holder.get('host', 'this machine')}"
            raise UserError(
                f"The run's folder is in use by {process}{since}.",
                where=str(folder),
                fix="Wait for it, or end it; or choose another train.output.",
            ) from None
        if _is_in_place(descriptor, folder):
            break
        os.close(descriptor)  # its owner removed it meanwhile
    facts = {"pid": os.getpid(), "host": socket.gethostname(), "since": datetime.now().isoformat(" ", "seconds")}
    with suppress(OSError):  # of a full disk: the lock holds without words
        os.ftruncate(descriptor, 0)
        os.write(descriptor, json.dumps(facts).encode())
    return descriptor


def _lock(descriptor: int) -> None:
    if sys.platform == "win32":
        import msvcrt

        os.lseek(descriptor, FAR, os.SEEK_SET)
        msvcrt.locking(descriptor, msvcrt.LK_NBLCK, 1)
        os.lseek(descriptor, 0, os.SEEK_SET)
    else:
        import fcntl

        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)


def _is_in_place(descriptor: int, folder: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(descriptor), (folder / LOCK).stat())
    except FileNotFoundError:
        return False


def _read(folder: Path) -> dict[str, object]:
    with suppress(OSError, ValueError):
        facts = json.loads((folder / LOCK).read_text(encoding="utf-8"))
        return facts if isinstance(facts, dict) else {}
    return {}


def _remove_empty(folders: list[Path]) -> None:
    """Remove folders, the innermost first, that nothing has come into."""
    with suppress(OSError):
        for folder in folders:
            folder.rmdir()
