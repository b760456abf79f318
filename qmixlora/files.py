"""Files and folders that are either whole or not there: written beside their place and renamed into it."""

from __future__ import annotations

import errno
import json
import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from safetensors import SafetensorError

from .errors import UserError


def cache_folder() -> Path:
    """Where what is made once on a machine is kept."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "qmixlora"


def write_json(path: Path, content: Mapping[str, Any]) -> None:
    """Write a JSON file, so that nobody ever reads half of it."""
    temporary = path.with_name(path.name + ".tmp")
    temporary.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
    temporary.replace(path)


@contextmanager
def put_in_place(folder: Path) -> Iterator[Path]:
    """A folder to write into, which becomes `folder` when the block ends well and vanishes when it does not.

    After a crash it lies beside `folder` under a name that starts with a dot, until the next attempt removes it.
    """
    temporary = folder.with_name(f".{folder.name}.tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    try:
        yield temporary
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise
    shutil.rmtree(folder, ignore_errors=True)
    temporary.replace(folder)


@contextmanager
def clear_disk_errors(folder: Path, fix: str) -> Iterator[None]:
    """Turn a full disk, in whatever words a library says it, into one clear message that ends in `fix`."""
    try:
        yield
    except (OSError, RuntimeError, SafetensorError) as error:
        text = str(error).lower()
        full = isinstance(error, OSError) and error.errno in {errno.ENOSPC, errno.EDQUOT}
        if full or "no space left" in text or "os error 28" in text or "file write failed" in text:
            raise UserError("The disk is full.", where=str(folder.resolve()), fix=fix) from error
        raise
