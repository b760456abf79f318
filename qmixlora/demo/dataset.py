"""The embedded data set, on disk as LLaVA JSON with PNG pictures."""

from __future__ import annotations

import json
import os
import random
import shutil
from pathlib import Path
from typing import Any

from .scenes import digit_scans, draw_scene, sample_scene
from .tasks import HELD_OUT, TASKS, DemoTask

SPLITS = {"train": 2500, "validation": 20, "test": 60}  # samples per task
HELD_OUT_SPLIT = "held_out"  # the tasks that training never sees
SCANS = {"train": (0.0, 0.8), "validation": (0.8, 0.9), "test": (0.9, 1.0)}  # shares of the handwritten digits
TASKS_PER_PICTURE = 5  # the same picture, other questions


def make_dataset(folder: Path, seed: int = 0) -> Path:
    """Write train.json, validation.json, test.json, held_out.json and images/, if they are not there yet.

    No handwriting is shared between train, validation and test. The same seed gives the same bytes.
    """
    if folder.is_dir():
        return folder
    temporary = folder.with_name(f"{folder.name}.{os.getpid()}.tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    (temporary / "images").mkdir(parents=True)
    for split, count in SPLITS.items():
        _write_split(temporary, split, split, TASKS, count, seed)
    _write_split(temporary, HELD_OUT_SPLIT, "test", HELD_OUT, SPLITS["test"], seed)
    temporary.replace(folder)
    return folder


def _write_split(folder: Path, name: str, scans_of: str, tasks: tuple[DemoTask, ...], per_task: int, seed: int) -> None:
    rng = random.Random(f"{seed}/{name}")
    first, last = (int(share * len(digit_scans()[1])) for share in SCANS[scans_of])
    rows: list[dict[str, Any]] = []
    order = [task for _ in range(per_task) for task in tasks]
    step = min(TASKS_PER_PICTURE, len(tasks))
    for start in range(0, len(order), step):
        scene = sample_scene(rng, range(first, last))
        image = f"images/{name}-{start // step:05}.png"
        draw_scene(scene).save(folder / image)
        for task in order[start : start + step]:
            question, answer = task.ask(scene, rng)
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
    (folder / f"{name}.json").write_text(json.dumps(rows, indent=1) + "\n", encoding="utf-8")
