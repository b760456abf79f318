"""The manifest of a folder: the size and SHA-256 of each of its files, written when all of them are.

A folder is promised first, filled, and then sealed: one that is promised and not sealed was never finished, and in a
sealed one every later change shows. Folders of earlier releases have no manifest.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from .errors import UserError
from .files import write_json

MANIFEST = "manifest.json"
VERSION = 1  # of the manifest and of the folder's layout
NEVER_READ = ("training_args.bin", "README.md")  # files of other libraries that nothing depends on


def promise(folder: Path) -> None:
    """Say in a folder, new or old, that its files are being written and that a manifest will follow."""
    write_json(folder / MANIFEST, {"version": VERSION, "files": None})


def seal(folder: Path, names: Iterable[str] | None = None) -> None:
    """Write the manifest of these files (by default all below the folder, but for hidden ones)."""
    paths = sorted(_files_below(folder)) if names is None else [folder / name for name in names]
    files = {path.relative_to(folder).as_posix(): _described(path) for path in paths}
    write_json(folder / MANIFEST, {"version": VERSION, "files": files})


def add(folder: Path, names: Iterable[str]) -> None:
    """Enter files into the manifest of a sealed folder, in place of earlier ones of their names."""
    files = _listed(folder / MANIFEST)
    assert isinstance(files, dict), "it was sealed"
    files |= {name: _described(folder / name) for name in names}
    write_json(folder / MANIFEST, {"version": VERSION, "files": files})


def has_manifest(folder: Path) -> bool:
    """Whether this release, or a later one, has written the folder."""
    return (folder / MANIFEST).exists()


def first_change(folder: Path, names: Iterable[str] | None = None) -> str | None:
    """What is first found to be other than the manifest says, of these files (by default all of it); None if nothing
    is, or if there is no manifest.

    Raises:
        UserError: the manifest is of a later release.
    """
    if not has_manifest(folder):
        return None
    files = _listed(folder / MANIFEST)
    if isinstance(files, str):
        return files
    for name in files if names is None else [name for name in names if name in files]:
        path, wanted = folder / name, files[name]
        if not path.is_file():
            return f"{name} is missing"
        if path.stat().st_size != wanted["size"]:
            return f"{name} has {path.stat().st_size:,} bytes, and had {wanted['size']:,}"
        if _described(path) != wanted:
            return f"{name} has another content than was written"
    return None


def check_unchanged(folder: Path, names: Iterable[str], what: str) -> None:
    """Compare files with the manifest, if there is one. Raises UserError for the first that was changed, or as
    `first_change`; `what` says what they are.
    """
    if change := first_change(folder, names):
        raise UserError(
            f"{what} is not as it was written: {change}.",
            where=str(folder),
            fix=f"Take a whole copy, or make it anew. If the change was meant, remove {MANIFEST}.",
        )


def _listed(manifest: Path) -> dict[str, Any] | str:
    """The files in a manifest, or what is wrong with it."""
    try:
        content = json.loads(manifest.read_text(encoding="utf-8"))
        version, files = content["version"], content["files"]
        whole = files is None or all({"size", "sha256"} <= entry.keys() for entry in files.values())
    except (OSError, ValueError, TypeError, KeyError, AttributeError):
        return f"{manifest.name} is broken"
    if not isinstance(version, int) or version > VERSION:
        raise UserError(
            f"The folder is of a later release: its format is {version}, and this release knows {VERSION}.",
            where=str(manifest),
            fix="Upgrade qmixlora.",
        )
    if files is None:
        return "it was never finished"
    return files if whole else f"{manifest.name} is broken"


def _files_below(folder: Path) -> Iterable[Path]:
    for path in folder.rglob("*"):
        hidden = any(part.startswith(".") for part in path.relative_to(folder).parts)
        if path.is_file() and not hidden and path.name not in (MANIFEST, *NEVER_READ):
            yield path


def _described(path: Path) -> dict[str, Any]:
    with path.open("rb") as file:
        return {"size": path.stat().st_size, "sha256": hashlib.file_digest(file, "sha256").hexdigest()}
