"""The embedded data set, on disk as LLaVA JSON with PNG images."""

from __future__ import annotations

import json
import random
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from qmixlora.errors import UserError
from qmixlora.files import replacing

from .scenes import digit_scans, draw_scene, sample_scene
from .tasks import HELD_OUT, TASKS, DemoTask

SPLITS = {"train": 2500, "validation": 60, "test": 60}  # samples per task
HELD_OUT_SPLIT = "held_out"  # the tasks that training never sees
PARAPHRASED_SPLIT = "paraphrased"  # the test split, asked in other words
SCANS = {"train": (0.0, 0.8), "validation": (0.8, 0.9), "test": (0.9, 1.0)}  # shares of the handwritten digits
TASKS_PER_IMAGE = 5  # the same image, other questions


def make_dataset(folder: Path, seed: int = 0, splits: Mapping[str, int] | None = None) -> Path:
    """Write train.json, validation.json, test.json, held_out.json, paraphrased.json and images/, unless they are there.

    No handwriting is shared between train, validation and test. The same seed gives the same bytes. `splits` are the
    samples per task (default SPLITS); the training samples do not depend on the size of the others.

    Raises:
        UserError: the folder is there, but is not (or not all of) such a data set.
    """
    splits = splits or SPLITS
    if is_whole(folder, [*splits, HELD_OUT_SPLIT, PARAPHRASED_SPLIT]):
        return folder
    with replacing(folder, unless_there=True) as temporary:
        (temporary / "images").mkdir(parents=True)
        for split, count in splits.items():
            _write_split(temporary, split, split, TASKS, count, seed)
        _write_split(temporary, HELD_OUT_SPLIT, "test", HELD_OUT, splits["test"], seed)
        write_rows(temporary, PARAPHRASED_SPLIT, _rows(temporary, "test", "test", TASKS, splits["test"], seed, True))
    return folder


def is_whole(folder: Path, names: Iterable[str]) -> bool:
    """Whether a data set is there, with all of these splits.

    Raises:
        UserError: the folder is there, but not all of them.
    """
    if not folder.is_dir():
        return False
    missing = [f"{name}.json" for name in names if not (folder / f"{name}.json").is_file()]
    if missing:
        raise UserError(
            f"This folder is not a whole demo data set: {', '.join(missing)} is missing.",
            where=str(folder),
            fix="Remove it, and it is made again; or choose another folder.",
        )
    return True


def _write_split(folder: Path, name: str, scans_of: str, tasks: tuple[DemoTask, ...], per_task: int, seed: int) -> None:
    write_rows(folder, name, _rows(folder, name, scans_of, tasks, per_task, seed))


def _rows(
    folder: Path,
    name: str,
    scans_of: str,
    tasks: tuple[DemoTask, ...],
    per_task: int,
    seed: int,
    other_words: bool = False,
) -> list[dict[str, Any]]:
    """The rows of a split, whose images are drawn into `images/`; in other words they are about the same images."""
    rng = random.Random(f"{seed}/{name}")
    first, last = (int(share * len(digit_scans()[1])) for share in SCANS[scans_of])
    rows: list[dict[str, Any]] = []
    order = [task for _ in range(per_task) for task in tasks]
    step = min(TASKS_PER_IMAGE, len(tasks))
    for start in range(0, len(order), step):
        scene = sample_scene(rng, range(first, last))
        image = f"images/{name}-{start // step:05}.png"
        if not other_words:
            draw_scene(scene).save(folder / image)
        for task in order[start : start + step]:
            question, answer = task.ask(scene, rng, other_words=other_words)
            rows.append(
                {
                    "id": f"{name}-{len(rows):05}",
                    "image": image,
                    "task": task.name,
                    "conversations": [
                        {"from": "human", "value": f"<image>\n{question}"},
                        {"from": "gpt", "value": answer},
                    ],
                }
            )
    return rows


def write_rows(folder: Path, name: str, rows: list[dict[str, Any]]) -> None:
    """Write the rows of a split."""
    (folder / f"{name}.json").write_text(json.dumps(rows, indent=1) + "\n", encoding="utf-8")
