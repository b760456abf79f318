"""The files of scores: one for every split and model, in the folder of the run or export that was evaluated."""

from __future__ import annotations

import json
from contextlib import suppress
from pathlib import Path

from qmixlora.errors import UserError
from qmixlora.files import clear_disk_errors, write_json

from .scores import Scores


def results_file(split: str, *, backbone: bool = False) -> str:
    """The file's name of scores in the folder of a run or an export; `backbone`: of the model without its adapter."""
    other_split = [] if split == "test" and not backbone else [split]
    return "-".join(["evaluation", *other_split, *(["backbone"] if backbone else [])]) + ".json"


def write_results(folder: Path, scores: Scores, *, backbone: bool = False) -> str:
    """Write scores into a folder, and say where, and whether other ones were there.

    Raises:
        UserError: the folder cannot be written into, or the disk is full.
    """
    file = folder / results_file(scores.split, backbone=backbone)
    with suppress(OSError, ValueError):
        if json.loads(file.read_text(encoding="utf-8")) == json.loads(json.dumps(scores.to_dict())):
            return f"{file} has the same scores already."
    said = f"Written to {file}" + (", in place of other scores." if file.exists() else ".")
    try:
        with clear_disk_errors(folder, "Free some space and evaluate again."):
            write_json(file, scores.to_dict())
    except OSError as error:
        raise UserError(f"The scores cannot be written: {error.strerror}.", where=str(file)) from error
    return said
