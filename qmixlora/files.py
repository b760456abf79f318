"""Files and folders that are whole or not there: written beside their place and renamed into it."""

from __future__ import annotations

import ctypes
import errno
import json
import os
import shutil
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from safetensors import SafetensorError

from .errors import UserError

EXCHANGE = 2  # RENAME_EXCHANGE of Linux, RENAME_SWAP of macOS
AT_WORKING_FOLDER = -100  # AT_FDCWD
FULL = (  # of errors that mean a full disk
    "no space left",
    "os error 28",  # Rust
    "file write failed",  # torch, while it writes a file of its zip format
    "unexpected pos",  # and when it ends one
    "iostream error",  # C++
)
UNUSABLE = {
    errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOTDIR, errno.EEXIST, errno.ENOSPC, errno.EDQUOT, errno.ENAMETOOLONG,
}  # fmt: skip


def cache_folder() -> Path:
    """The folder for files that are made once on a machine."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "qmixlora"


@contextmanager
def replacing(path: Path, *, unless_there: bool = False) -> Iterator[Path]:
    """Yield a path beside `path` to make a file or a folder at; rename it into place when the block ends well, remove
    it when it does not.

    There is a whole one at `path` at every moment, if there was one before. A crash leaves a file beside `path` whose
    name starts with a dot; the next attempt removes it. With `unless_there` a folder that another process has put in
    place meanwhile stays.

    Raises:
        UserError: a file would take the place of a folder, or a folder that of a file; what is there stays.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    _remove_leftovers(path)
    temporary = _of_this_process(path)
    try:
        yield temporary
        if unless_there and path.exists():
            _remove(temporary)
            return
        _put_into_place(temporary, path)
    except BaseException as error:
        if isinstance(error, OSError) and error.errno and error.filename in (None, str(temporary)):
            error.filename = str(path)  # a name that somebody knows
        _remove(temporary)
        raise


@contextmanager
def scratch_folder(parent: Path) -> Iterator[Path]:
    """Yield a path in a folder for what this process needs for a while; remove what is there when the block ends.

    What a crash leaves there, the next attempt removes.
    """
    path = parent / "scratch"
    _remove_leftovers(path)
    temporary = _of_this_process(path)
    try:
        yield temporary
    finally:
        _remove(temporary)


def link_or_copy(source: Path, path: Path) -> None:
    """Make a second name for a file's bytes, a hard link; a copy where the file system has none, or is another one."""
    try:
        os.link(source.resolve(), path)
    except OSError:
        shutil.copyfile(source, path)


def write_json(path: Path, content: Mapping[str, Any]) -> None:
    """Write a JSON file, so that nobody ever reads half of it."""
    with replacing(path) as temporary:
        temporary.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def read_log(path: Path) -> list[dict[str, Any]]:
    """The objects in a JSON Lines file; lines that a crash cut short are left out, as is a missing file."""
    records = []
    if path.is_file():
        for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
            with suppress(ValueError):
                record = json.loads(line)
                records += [record] if isinstance(record, dict) else []
    return records


def append_to_log(path: Path, record: Mapping[str, Any]) -> None:
    """Add a line to a JSON Lines file. Raises ValueError for a number that JSON does not have (NaN)."""
    path.parent.mkdir(parents=True, exist_ok=True)
    line = (json.dumps(record, allow_nan=False) + "\n").encode()
    with path.open("a+b") as file:
        if file.tell():
            file.seek(-1, os.SEEK_END)
            cut_short = file.read(1) != b"\n"  # by a crash: the record must not end up on the same line
            file.write(b"\n" * cut_short)
        file.write(line)


@contextmanager
def clear_read_errors(path: Path, fix: str) -> Iterator[None]:
    """Turn what libraries raise for a damaged file into one clear message that ends in `fix`.

    For blocks that read a file and take apart what it holds, and do nothing else.
    """
    try:
        yield
    except UserError:
        raise
    except (OSError, ValueError, KeyError, TypeError, AttributeError, IndexError, SafetensorError) as error:
        said = f"it has no {error}" if isinstance(error, KeyError) else " ".join(str(error).split())
        raise UserError(f"{path.name} cannot be read: {said}.", where=str(path), fix=fix) from error


@contextmanager
def clear_disk_errors(folder: Path, fix: str) -> Iterator[None]:
    """Turn a full disk, however a library words it, into one clear message that ends in `fix`."""
    try:
        yield
    except (OSError, RuntimeError, SafetensorError) as error:
        text = str(error).lower()
        full = isinstance(error, OSError) and error.errno in {errno.ENOSPC, errno.EDQUOT}
        if full or any(words in text for words in FULL):
            raise UserError("The disk is full.", where=str(folder.resolve()), fix=fix) from error
        raise


def check_can_be_written(folder: Path) -> None:
    """Raise OSError if nothing can be written in a folder, or if it is not there and cannot be made: before long work,
    whose result goes there.
    """
    nearest = next(path for path in (folder, *folder.absolute().parents) if path.exists())
    if not nearest.is_dir():
        raise NotADirectoryError(errno.ENOTDIR, os.strerror(errno.ENOTDIR), str(nearest))
    if not os.access(nearest, os.W_OK | os.X_OK):
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(nearest))


def unusable(error: OSError) -> UserError | None:
    """One clear message for a file or folder that the system lets nobody write or read there; None for errors of other
    kinds, which are no mistakes of the user's. The cache has to be somewhere: of it everything is told.
    """
    if error.errno is None or not isinstance(error.filename, str | bytes | os.PathLike):
        return None
    path, cache = Path(os.fsdecode(error.filename)).absolute(), cache_folder().absolute()
    is_of_cache = path.is_relative_to(cache) or cache.is_relative_to(path)
    if error.errno not in UNUSABLE and not is_of_cache:
        return None
    fix = "Set XDG_CACHE_HOME to a folder that can be written." if is_of_cache else "Choose another, or change that."
    return UserError(f"A file or folder cannot be used: {error.strerror}.", where=str(path), fix=fix)


def _of_this_process(path: Path) -> Path:
    """A hidden name beside a path, which no other process takes."""
    return path.with_name(f".{path.name}.{os.getpid()}.tmp")


def _put_into_place(temporary: Path, path: Path) -> None:
    """Rename a file or folder; a folder that is in its place (a rename replaces none) is removed after that."""
    if path.exists() and path.is_dir() != temporary.is_dir():
        there, new = ("folder", "file") if path.is_dir() else ("file", "folder")
        raise UserError(
            f"There is a {there} where a {new} would be written.",
            where=str(path),
            fix=f"Name another {new}, or move the {there} away.",
        )
    if not path.is_dir() or path.is_symlink():
        temporary.replace(path)
    elif _exchanged(temporary, path):
        _remove(temporary)
    else:
        former = temporary.with_suffix(".old")
        path.rename(former)
        temporary.rename(path)
        _remove(former)


def _exchanged(one: Path, other: Path) -> bool:
    """Let two names change places in one moment. Return false where the system or the file system does not do that."""
    names = os.fsencode(one), os.fsencode(other)
    if sys.platform == "linux":
        rename = getattr(ctypes.CDLL(None), "renameat2", None)
        return rename is not None and rename(AT_WORKING_FOLDER, names[0], AT_WORKING_FOLDER, names[1], EXCHANGE) == 0
    if sys.platform == "darwin":
        return bool(ctypes.CDLL(None).renamex_np(*names, EXCHANGE) == 0)
    return False


def _remove_leftovers(path: Path) -> None:
    """Remove what dead processes have left beside a path; a folder that one had just moved away goes back."""
    for leftover in (*path.parent.glob(f".{path.name}.*.tmp"), *path.parent.glob(f".{path.name}.*.old")):
        process = leftover.stem.removeprefix(f".{path.name}.")
        if process.isdecimal() and not _runs(int(process)):
            if leftover.suffix == ".old" and not path.exists():
                leftover.rename(path)
            else:
                _remove(leftover)


def _runs(process: int) -> bool:
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except OSError:  # somebody else's
        return True
    return process != os.getpid()  # our own number: a process before us had it


def _remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)
