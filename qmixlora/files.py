"""Files and folders that are whole or not there: written beside their place and renamed into it."""

from __future__ import annotations

import errno
import json
import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from safetensors import SafetensorError

from .errors import UserError


def cache_folder() -> Path:
    """The folder for files that are made once on a machine."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "qmixlora"


@contextmanager
def replacing(path: Path, *, unless_there: bool = False) -> Iterator[Path]:
    """Yield a path beside `path` to make a file or a folder at; rename it into place when the block ends well, remove
    it when it does not.

    A crash leaves a file beside `path` whose name starts with a dot; the next attempt removes it. With
    `unless_there` a folder that another process has put in place meanwhile stays.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    _remove_leftovers(path)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        yield temporary
        if unless_there and path.exists():
            _remove(temporary)
            return
        if path.is_dir():
            shutil.rmtree(path)
        temporary.replace(path)
    except BaseException:
        _remove(temporary)
        raise


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
    """Add a line to a JSON Lines file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a+b") as file:
        if file.tell():
            file.seek(-1, os.SEEK_END)
            cut_short = file.read(1) != b"\n"  # by a crash: the record must not end up on the same line
            file.write(b"\n" * cut_short)
        file.write((json.dumps(record) + "\n").encode())


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
        if full or "no space left" in text or "os error 28" in text or "file write failed" in text:
            raise UserError("The disk is full.", where=str(folder.resolve()), fix=fix) from error
        raise


def _remove_leftovers(path: Path) -> None:
    """Remove the temporary files that dead processes have left beside a path."""
    for leftover in path.parent.glob(f".{path.name}.*.tmp"):
        process = leftover.name.removesuffix(".tmp").rpartition(".")[2]
        if process.isdigit() and not _runs(int(process)):
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
