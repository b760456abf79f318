"""The files of results, for every split (or file) and model, in the folder of the run or export that was evaluated: its
scores, and every prediction that they come from.
"""

from __future__ import annotations

import json
from contextlib import suppress
from pathlib import Path

from qmixlora.data import load_split, splits_of
from qmixlora.errors import UserError, typed
from qmixlora.files import clear_disk_errors, clear_read_errors, replacing, write_json
from qmixlora.recipe import load_run_recipe

from .scores import Scores, UnscoredError, blind_baseline

SCORES, PREDICTIONS, UNSCORED = "evaluation", "predictions", "unscored"


def results_file(split: str, *, backbone: bool = False) -> str:
    """The file's name of scores in the folder of a run or an export; `backbone`: of the model without its adapter."""
    return f"{SCORES}{_what(split, backbone)}.json"


def predictions_file(split: str, *, backbone: bool = False) -> str:
    """The name of the file with the predictions of these scores."""
    return f"{PREDICTIONS}{_what(split, backbone)}.jsonl"


def _what(split: str, backbone: bool) -> str:
    other_split = [] if split == "test" and not backbone else [split]
    return "".join(f"-{part}" for part in [*other_split, *(["backbone"] if backbone else [])])


def write_results(folder: Path, scores: Scores, *, backbone: bool = False) -> str:
    """Write scores and predictions into a folder, and say where, and whether other ones were there.

    Raises:
        UserError: the folder cannot be written into, or the disk is full.
    """
    file = folder / results_file(scores.split, backbone=backbone)
    predictions = folder / predictions_file(scores.split, backbone=backbone)
    same = False
    with suppress(OSError, ValueError):
        same = json.loads(file.read_text(encoding="utf-8")) == json.loads(json.dumps(scores.to_dict()))
    said = f"Written to {file}" + (", in place of other scores" if file.exists() else "")
    try:
        with clear_disk_errors(folder, "Free some space and evaluate again."):
            with replacing(predictions) as temporary:
                scores.write_predictions(temporary)
            if not same:
                write_json(file, scores.to_dict())
    except OSError as error:
        raise UserError(f"The scores cannot be written: {error.strerror}.", where=str(file)) from error
    return f"{file} has the same scores already." if same else f"{said}; every answer in {predictions.name}."


def keep_unscored(folder: Path, error: UnscoredError, *, backbone: bool = False) -> UserError:
    """Write answers that a metric could not score into a folder; returns what to raise, which says where they are."""
    file = folder / f"{UNSCORED}{_what(error.split, backbone)}.jsonl"
    lines = "".join(f"{json.dumps(one, ensure_ascii=False)}\n" for one in error.predictions)
    with clear_disk_errors(folder, "Free some space and evaluate again."), replacing(file) as temporary:
        temporary.write_text(lines, encoding="utf-8")
    return UserError(f"{error.what} The answers are kept in {file}.", where=error.where, fix=error.fix)


def read_results(folder: Path, split: str, *, backbone: bool = False) -> Scores:
    """The scores of a folder that `write_results` wrote into, with their predictions.

    Raises:
        UserError: there are none, or one of the files is damaged, or of another evaluation than the other.
    """
    file = folder / results_file(split, backbone=backbone)
    predictions = folder / predictions_file(split, backbone=backbone)
    fix = f"`{typed('eval', folder, '--split', split, *(['--backbone'] if backbone else []))}` makes them."
    for needed in (file, predictions):
        if not needed.is_file():
            raise UserError(f"There is no {needed.name}.", where=str(folder), fix=fix)
    with clear_read_errors(file, fix):
        scores = Scores.read(file)
    with clear_read_errors(predictions, fix):
        return scores.with_predictions(predictions)


def blind_guess(folder: Path, split: str) -> Scores:
    """The `blind_baseline` of a run: what its training answers alone are worth on a split of its recipe.

    Raises UserError as `load_split`, and where the answers are of another file.
    """
    data = load_run_recipe(folder).data
    if split not in splits_of(data):
        raise UserError(
            f"A blind guess is made for a split of the recipe, which {split} is not.",
            where="--blind",
            fix=f"Leave --blind out, or name one of {', '.join(splits_of(data))}.",
        )
    return blind_baseline(load_split(data, "train"), load_split(data, split), split, data)
