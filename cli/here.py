"""A look at the paths of a command before anything heavy is imported: a typo is told at once."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from qmixlora.errors import UserError, path_meant
from qmixlora.files import check_can_be_written

RUN = ("recipe.yaml",)
FIDELITY = "fidelity.json"  # in every export
MODEL = ("adapter_config.json", "config.json")  # beside a run: an export, or any model


def folder(path: Path, what: str = "a run or an export") -> Path:
    """A folder. Raises UserError if it is none."""
    if not path.is_dir():
        fix = path_meant(path) or f"Name the folder of {what}."
        raise UserError("There is no such folder.", where=str(path), fix=fix)
    return path


def folder_of_run(path: Path) -> Path:
    """The folder of a run. Raises UserError if it is none, such as an export's, which has the recipe of its run."""
    if (path / FIDELITY).is_file():
        run = path.resolve().parent.parent
        fix = f"Did you mean {run}?" if (run / RUN[0]).is_file() else "Name the folder of the run that it was made of."
        raise UserError("This is the folder of an export, not of a run.", where=str(path), fix=fix)
    return _folder_with(path, RUN, "a run")


def folder_with_recipe(path: Path) -> Path:
    """The folder of a run or of an export. Raises UserError if it is neither."""
    return _folder_with(path, RUN, "a run or an export")


def folder_of_model(path: Path) -> Path:
    """The folder of a run, an export or a model. Raises UserError if it is none of them."""
    return _folder_with(path, (*RUN, *MODEL), "a finished run, an export or a model")


def file(path: Path | None, flag: str) -> None:
    """Raise UserError if a file is named that is not there, or that is a folder."""
    if path is not None and path.is_dir():
        raise UserError("This is a folder, not a file.", where=f"{flag} {path}", fix="Name a file in it.")
    if path is not None and not path.is_file():
        raise UserError("There is no such file.", where=f"{flag} {path}", fix=path_meant(path))


def new_file(path: Path, flag: str) -> None:
    """Raise UserError if no file can be written at a path: a folder is there, or none to write it in; and OSError if
    nothing can be written in that one.
    """
    if path.is_dir():
        raise UserError("There is a folder where a file would be written.", where=f"{flag} {path}", fix="Name a file.")
    if not path.parent.is_dir():
        raise UserError("There is no such folder.", where=f"{flag} {path.parent}", fix=path_meant(path.parent))
    check_can_be_written(path.parent)


def write_new(path: Path, text: str) -> None:
    """Write a recipe's file. Raises UserError if it is there, or cannot be written."""
    try:
        with path.open("x", encoding="utf-8") as target:
            target.write(text)
    except FileExistsError:
        raise there_already(path) from None
    except OSError as error:
        raise UserError(f"Cannot write the recipe: {error}", where=str(path)) from None


def there_already(path: Path) -> UserError:
    """A file that is never written over."""
    return UserError("The file exists.", where=str(path), fix="Name another file.")


def only_with(whole: str, is_there: bool, parts: Mapping[str, object]) -> None:
    """Raise UserError for an option (one that is not None) that says nothing without another one, `whole`, if it is not
    there.
    """
    given = next((name for name, value in parts.items() if value is not None), None)
    if given and not is_there:
        raise UserError(
            f"{given} is of {whole}, and nothing would come of it.",
            where=given,
            fix=f"Add {whole}, or leave {given} out.",
        )


def not_both(options: Mapping[str, object]) -> None:
    """Raise UserError if more than one of these options is given: they exclude each other."""
    given = [name for name, value in options.items() if value]
    if len(given) > 1:
        raise UserError(f"{' and '.join(given)} do not go together.", where="command line", fix="Give one of them.")


def held_out(folder: Path) -> str:
    """The split that a run, or an export, is measured on where none is named."""
    from qmixlora.data import held_out_split
    from qmixlora.recipe import load_run_recipe

    return held_out_split(load_run_recipe(folder).data) if (folder / RUN[0]).is_file() else "test"


def _folder_with(path: Path, names: tuple[str, ...], what: str) -> Path:
    folder(path, what)
    if not any((path / name).is_file() for name in names):
        below = sorted(found.parent for name in names for found in path.glob(f"*/{name}"))
        fix = f"Did you mean {below[0]}?" if below else f"Name the folder of {what}."
        lacking = " or ".join(names)
        raise UserError(f"This is not the folder of {what}: it has no {lacking}.", where=str(path), fix=fix)
    return path
