"""The rows that a model can be taught: all looked at before the first step, so that none ends a run in its middle."""

from __future__ import annotations

from functools import cache

from datasets import Dataset
from rich.console import Console
from rich.progress import track

from qmixlora.data.formats import IMAGE, Conversation, ImageFile, Turn, question_about
from qmixlora.data.images.opening import check_body
from qmixlora.data.images.shapes import shape_problem
from qmixlora.data.refusals import Refusals
from qmixlora.data.rendering.answers import one_answer_each
from qmixlora.data.rendering.collate import Collator, check_length
from qmixlora.data.rendering.lengths import Lengths, by_path
from qmixlora.errors import UserError
from qmixlora.recipe import Data

from . import verdicts

MANY = 2000  # rows that take long enough to show how far it is


def taught(rows: Dataset, collator: Collator, data: Data, source: str) -> Dataset:
    """What some rows teach a model whose batches the collator makes: one answer each where its chat template asks for
    that (see `one_answer_each`), and no row that does not fit.

    Refused are rows longer than `data.max_length`, rows that the template cannot render, images of a shape that the
    processor refuses, and with `data.check_images: full` images that cannot be decoded. With `data.on_bad_sample: skip`
    they are left out, which is said on stderr.

    Raises:
        UserError: rows are refused: all are counted, and the first ten named.
    """
    rows = one_answer_each(rows, collator.template)
    kept, refusals = looked_at(rows, collator, data, source)
    if not refusals.count:
        return rows
    if data.on_bad_sample == "stop" or not kept:
        raise refusals.error(source)
    refusals.say(source, len(rows))
    return rows.select(kept)


def looked_at(rows: Dataset, collator: Collator, data: Data, source: str) -> tuple[list[int], Refusals]:
    """(the rows that fit, those that do not). Of many rows it is remembered, unless all images are to be decoded."""
    place = None
    if len(rows) >= MANY and data.check_images == "header":
        place = verdicts.place_of(rows, collator, data)
        if (found := verdicts.kept(place, len(rows))) is not None:
            return found
    kept, refusals = _looked_at(rows, collator, data, source)
    if place is not None:
        verdicts.keep(place, kept, len(rows), refusals)
    return kept, refusals


def _looked_at(rows: Dataset, collator: Collator, data: Data, source: str) -> tuple[list[int], Refusals]:
    judge, refusals, kept = _Judge(collator, data), Refusals(), []
    console = Console(stderr=True)
    shown = track(
        rows, "looking at samples", console=console, disable=len(rows) < MANY or not console.is_terminal, transient=True
    )
    for index, row in enumerate(shown):
        try:
            judge.look_at(row)
            kept.append(index)
        except UserError as refusal:
            refusals.add(UserError(refusal.what, where=_place(refusal.where, source, index, row)))
    return kept, refusals


def _place(file: str, source: str, index: int, row: Conversation) -> str:
    asked = row["turns"][0]["text"].replace(IMAGE, "").strip()[:60]
    sample = f"{source}, sample {index} (task {row['task']}: {asked!r})"
    return f"{file} of {sample}" if file else sample


class _Judge:
    """Looks at rows one by one. What is asked again and again is remembered."""

    def __init__(self, collator: Collator, data: Data) -> None:
        self.collator, self.data = collator, data
        self.length = Lengths(collator)
        self.frame = cache(self._frame)
        self.alone = cache(self._alone)
        self.problem = cache(lambda size: shape_problem(collator.processor, size, data.max_pixels))
        self.body = by_path(lambda image: check_body(image, data.max_pixels))

    def look_at(self, row: Conversation) -> None:
        """Raises UserError where the row cannot be taught."""
        if not row["images"] and (why := self.alone()):
            raise UserError(why, where="")
        image_tokens = sum(self._tokens_of(image) for image in row["images"])
        # a token stands for one byte at least, so that most rows need not be tokenized
        texts = sum(len(turn["text"].encode(errors="replace")) + 2 for turn in row["turns"])
        longest = self.data.max_length
        if self.frame(tuple(turn["role"] for turn in row["turns"])) + texts + image_tokens <= longest:
            return
        check_length(self.length(row, image_tokens), longest)

    def _tokens_of(self, image: ImageFile) -> int:
        if self.data.check_images == "full":
            self.body(image)
        size = self.length.size(image)
        if problem := self.problem(size):
            raise UserError(problem, where="")
        return self.length.of_image(size)

    def _alone(self) -> str | None:
        """Why the processor takes no sample without an image, if it takes none."""
        try:
            self.collator.prompts([question_about([], "a")])
        except (ValueError, TypeError, AttributeError) as error:  # as processors refuse it, each in its own words
            return f"The model's processor takes no sample without an image: {error}"
        return None

    def _frame(self, roles: tuple[str, ...]) -> int:
        """The tokens that the template writes around texts."""
        turns: list[Turn] = [{"role": role, "text": "a"} for role in roles]
        return self.length({"turns": turns, "images": [], "task": ""}, 0)
