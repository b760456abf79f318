"""Public benchmarks: a run, an export or a merged checkpoint as a model of lmms-eval (the extra `bench`).

lmms-eval finds `MANIFEST` by the entry point `lmms_eval.models`:

    lmms-eval --model qmixlora --model_args run=runs/my --tasks mme,pope --batch_size 8
"""

from __future__ import annotations

import contextlib
import io
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from lmms_eval.api.instance import Instance
from lmms_eval.api.model import lmms
from lmms_eval.models.registry_v2 import ModelManifest
from loguru import logger
from PIL import Image
from tqdm import tqdm

from qmixlora.data import IMAGE, Conversation, ImageFile, Turn, check_header
from qmixlora.data.formats import RESERVED
from qmixlora.errors import UserError
from qmixlora.session import Session, open_run

from .answers import generate_answers

MANIFEST = ModelManifest("qmixlora", chat_class_path=f"{__name__}.BenchmarkedRun")


class BenchmarkedRun(lmms):
    """What `--model qmixlora` is: answers as `qmixlora eval` has them, to the questions of lmms-eval's tasks.

    `--model_args`: `run`, the folder; `backbone=True`, the same model without its adapter; `task`, the one to route as,
    where the adapter routes on tasks. Decoding is greedy. Raises UserError as `open_run`.
    """

    is_simple = False  # it takes a task's messages, each with its images where they stand

    def __init__(
        self,
        run: str,
        task: str = "",
        backbone: bool = False,
        batch_size: int | str = 1,
        max_batch_size: int | None = None,
        device: str | None = None,
    ) -> None:
        super().__init__()
        self.session, self.task, self.backbone = open_run(Path(run).expanduser()), str(task), backbone
        if backbone:
            self.session.without_adapter()  # refused before the tasks are loaded
        for name, value in {"--device": device, "--max_batch_size": max_batch_size}.items():
            if value is not None:
                logger.warning(f"{name} has no effect on qmixlora's models.")
        recipe = self.session.recipe
        self.batch_size = int(batch_size) if str(batch_size).isdigit() else recipe.train.eval_batch_size

    def generate_until(self, requests: Sequence[Instance]) -> list[str]:
        """The answers to the requests of tasks with output_type `generate_until`, in their order."""
        answers = [""] * len(requests)
        with self._evaluating(), tqdm(total=len(requests), desc="answers", disable=self.rank != 0) as bar:
            for numbers in _alike(requests, self.batch_size):
                options = requests[numbers[0]].args[2]
                rows = [self._row(requests[number]) for number in numbers]
                for number, answer in zip(numbers, self._answers(rows, options), strict=True):
                    answers[number] = answer
                bar.update(len(numbers))
        return answers

    def loglikelihood(self, requests: Sequence[Instance]) -> list[tuple[float, bool]]:
        """Not offered: runs are judged by what they answer."""
        raise _not_offered("log-likelihoods")

    def generate_until_multi_round(self, requests: Sequence[Instance]) -> list[str]:
        """Not offered."""
        raise _not_offered("several rounds")

    @contextlib.contextmanager
    def _evaluating(self) -> Iterator[None]:
        bare = self.session.without_adapter() if self.backbone else contextlib.nullcontext()
        with self.session.evaluating(), bare:
            yield

    def _row(self, request: Instance) -> Conversation:
        _, to_messages, _, number, task, split = request.args
        return conversation(to_messages(self.task_dict[task][split][number]), self.session, self.task)

    def _answers(self, rows: Sequence[Conversation], options: Mapping[str, Any]) -> list[str]:
        if options.get("do_sample") or options.get("temperature"):
            logger.warning("The task asks for sampling; qmixlora answers greedily.")
        until = options.get("until") or []
        ends = [end for end in ([until] if isinstance(until, str) else until) if end.strip()]
        longest = options.get("max_new_tokens")  # else the run's own
        return [_up_to(answer, ends).strip() for answer in generate_answers(self.session, rows, longest)]


def conversation(messages: Sequence[Mapping[str, Any]], session: Session, task: str = "") -> Conversation:
    """A benchmark's chat messages, whose content lists hold texts and images (of Pillow, or paths), as a row.

    Raises UserError for video and audio, and for an image that may not be opened (`data.max_pixels`).
    """
    turns: list[Turn] = []
    images: list[ImageFile] = []
    for message in messages:
        parts = []
        for content in message["content"]:
            if content["type"] == "text":
                parts.append(content["text"].translate({ord(character): None for character in RESERVED}))
            elif content["type"] == "image":
                parts.append(IMAGE)
                images.append(_file(content["url"]))
                check_header(images[-1], session.recipe.data.max_pixels)
            else:
                raise _not_offered(content["type"])
        turns.append({"role": message["role"], "text": "\n".join(parts)})
    return {"turns": [*turns, {"role": "assistant", "text": ""}], "images": images, "task": task}


def _file(image: Image.Image | str) -> ImageFile:
    if isinstance(image, str):
        return {"path": image, "bytes": None}
    content = io.BytesIO()
    image.save(content, "PNG", compress_level=1)
    return {"path": None, "bytes": content.getvalue()}


def _alike(requests: Sequence[Instance], size: int) -> Iterator[list[int]]:
    """The numbers of the requests, in batches of at most `size` that are generated with the same options."""
    groups: dict[str, list[int]] = {}
    for number, request in enumerate(requests):
        groups.setdefault(repr(sorted(request.args[2].items(), key=str)), []).append(number)
    for group in groups.values():
        yield from (group[start : start + size] for start in range(0, len(group), size))


def _up_to(answer: str, ends: Sequence[str]) -> str:
    for end in ends:
        answer = answer.partition(end)[0]
    return answer


def _not_offered(what: str) -> UserError:
    return UserError(
        f"lmms-eval is offered no {what}.", where="--tasks", fix="Choose tasks about images, with generated answers."
    )
