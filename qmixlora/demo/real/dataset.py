"""The data set of the real backbone, on disk as LLaVA JSON with PNG images: scenes and handwriting in plain English,
instructions without an image, and conversations whose turns belong to different tasks.
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from qmixlora.demo.dataset import HELD_OUT_SPLIT, PARAPHRASED_SPLIT, SCANS, TASKS_PER_IMAGE, is_whole, write_rows
from qmixlora.demo.scenes import IMAGE_SIZE, Scene, digit_scans, draw_scan, draw_scene, sample_scene
from qmixlora.files import replacing

from .tasks import HANDWRITING, HELD_OUT, SCENE_TASKS, TEXT, RealTask
from .text import instruction

SPLITS = {"train": 500, "validation": 20, "test": 40}  # samples per task
CONVERSATIONS_SPLIT = "conversations"  # of several turns, the last of them answered
TURNS = (2, 3)  # questions in a conversation


def make_real_dataset(folder: Path, seed: int = 0, splits: Mapping[str, int] | None = None) -> Path:
    """Write train, validation, test, held_out, paraphrased, conversations (.json) and images/, unless they are there.

    Training has each task of the embedded data set as an open question, `choice`, `caption` and `reason`, the digits of
    scikit-learn alone (`handwriting`), `text` without an image, and as many conversations as samples of a task, in
    which each answer names its own task (the row's is that of the last). No handwriting is shared between train,
    validation and test. The same seed gives the same bytes.

    Raises:
        UserError: the folder is there, but is not (or not all of) such a data set.
    """
    splits = splits or SPLITS
    if is_whole(folder, [*splits, HELD_OUT_SPLIT, PARAPHRASED_SPLIT, CONVERSATIONS_SPLIT]):
        return folder
    with replacing(folder, unless_there=True) as temporary:
        (temporary / "images").mkdir(parents=True)
        for name, count in splits.items():
            split = _Split(temporary, name, name, count, seed)
            rows = [*split.questions(SCENE_TASKS), *split.handwriting(), *split.instructions()]
            write_rows(temporary, name, [*rows, *split.conversations()] if name == "train" else rows)
        test = _Split(temporary, "test", "test", splits["test"], seed)
        again = [*test.questions(SCENE_TASKS, other_words=True), *test.handwriting(other_words=True)]
        write_rows(temporary, PARAPHRASED_SPLIT, again)
        held_out = _Split(temporary, HELD_OUT_SPLIT, "test", splits["test"], seed)
        write_rows(temporary, HELD_OUT_SPLIT, list(held_out.questions(HELD_OUT)))
        talks = _Split(temporary, CONVERSATIONS_SPLIT, "test", splits["test"] * len(SCENE_TASKS), seed)
        write_rows(temporary, CONVERSATIONS_SPLIT, list(talks.conversations()))
    return folder


@dataclass(frozen=True)
class _Split:
    """Rows of one split; images are drawn on the way. Each kind of row has a generator of random numbers of its own, so
    that it stays as it is when another changes.
    """

    folder: Path
    name: str
    scans_of: str
    per_task: int
    seed: int

    def questions(self, tasks: Sequence[RealTask], *, other_words: bool = False) -> Iterator[dict[str, Any]]:
        """Questions about scenes, several tasks an image; in other words they are about the same images."""
        rng, words = self._generators("questions")
        order = [task for _ in range(self.per_task) for task in tasks]
        step = min(TASKS_PER_IMAGE, len(tasks))
        for start in range(0, len(order), step):
            scene, image = self._scene(rng, f"scene-{start // step:05}")
            for task in order[start : start + step]:
                yield _row(image, [(task.name, *task.ask(scene, rng, words, other_words=other_words))])

    def handwriting(self, *, other_words: bool = False) -> Iterator[dict[str, Any]]:
        """Scans of digits, enlarged to the size of a scene."""
        rng, words = self._generators("handwriting")
        for _ in range(self.per_task):
            scene = sample_scene(rng, self._scans())
            image = f"images/digit-{scene.digit_image:04}.png"
            draw_scan(scene.digit_image, IMAGE_SIZE).save(self.folder / image)
            yield _row(image, [(HANDWRITING.name, *HANDWRITING.ask(scene, rng, words, other_words=other_words))])

    def instructions(self) -> Iterator[dict[str, Any]]:
        """Instructions without an image."""
        rng, _ = self._generators("instructions")
        for _ in range(self.per_task):
            yield _row(None, [(TEXT, *instruction(rng))])

    def conversations(self) -> Iterator[dict[str, Any]]:
        """Conversations about a scene, each turn another task. Every task is the last as often as the others."""
        rng, words = self._generators("conversations")
        for number in range(self.per_task):
            last = SCENE_TASKS[number % len(SCENE_TASKS)]
            before = rng.sample([task for task in SCENE_TASKS if task != last], rng.choice(TURNS) - 1)
            scene, image = self._scene(rng, f"talk-{number:05}")
            yield _row(image, [(task.name, *task.ask(scene, rng, words)) for task in (*before, last)])

    def _generators(self, kind: str) -> tuple[random.Random, random.Random]:
        """For what is asked, and for the words."""
        name = f"{self.seed}/{self.name}/{kind}"
        return random.Random(name), random.Random(f"{name}/words")

    def _scans(self) -> range:
        first, last = (int(share * len(digit_scans()[1])) for share in SCANS[self.scans_of])
        return range(first, last)

    def _scene(self, rng: random.Random, name: str) -> tuple[Scene, str]:
        scene, image = sample_scene(rng, self._scans()), f"images/{self.name}-{name}.png"
        draw_scene(scene).save(self.folder / image)
        return scene, image


def _row(image: str | None, asked: Sequence[tuple[str, str, str]]) -> dict[str, Any]:
    """A row of (task, question, answer), one for each turn."""
    turns: list[dict[str, str]] = []
    for task, question, answer in asked:
        own = {"task": task} if len(asked) > 1 else {}
        turns += [{"from": "human", "value": question}, {"from": "gpt", "value": answer, **own}]
    if image is None:
        return {"task": asked[-1][0], "conversations": turns}
    turns[0]["value"] = f"<image>\n{turns[0]['value']}"
    return {"image": image, "task": asked[-1][0], "conversations": turns}
