"""A look at the paths of a command before anything heavy is imported: a typo is told at once."""

from __future__ import annotations

from pathlib import Path

from qmixlora.errors import UserError

RUN = ("recipe.yaml",)
MODEL = ("adapter_config.json", "config.json")  # beside a run: an export, or any model


def folder_of_run(folder: Path) -> Path:
    """The folder of a run. Raises UserError if it is none."""
    return _folder_with(folder, RUN, "a run")


def folder_of_model(folder: Path) -> Path:
    """The folder of a run, an export or a model. Raises UserError if it is none of them."""
    return _folder_with(folder, (*RUN, *MODEL), "a finished run, an export or a model")


def file(path: Path | None, flag: str) -> None:
    """Raise UserError if a file is named that is not there."""
    if path is not None and not path.is_file():
        raise UserError("There is no such file.", where=f"{flag} {path}", fix=_like(path))


def _folder_with(folder: Path, names: tuple[str, ...], what: str) -> Path:
    if not folder.is_dir():
        fix = _like(folder) or f"Name the folder of {what}."
        raise UserError("There is no such folder.", where=str(folder), fix=fix)
    if not any((folder / name).is_file() for name in names):
        below = sorted(path.parent for name in names for path in folder.glob(f"*/{name}"))
        fix = f"Did you mean {below[0]}?" if below else f"Name the folder of {what}."
        lacking = " or ".join(names)
        raise UserError(f"This is not the folder of {what}: it has no {lacking}.", where=str(folder), fix=fix)
    return folder


def _like(path: Path) -> str:
    """What was probably meant: a name beside it that is much like it."""
    import difflib

    names = [other.name for other in path.parent.iterdir()] if path.parent.is_dir() else []
    close = difflib.get_close_matches(path.name, names, n=1, cutoff=0.6)
    return f"Did you mean {path.parent / close[0]}?" if close else ""
