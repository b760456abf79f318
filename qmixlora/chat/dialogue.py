"""One conversation: an image, or none, and what was said."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from transformers import TextStreamer

from qmixlora.data import Collator, Conversation, ImageFile, Turn, check_body, locate, question_about
from qmixlora.errors import UserError, path_meant
from qmixlora.evaluation import generate_answers
from qmixlora.session import Session


class Dialogue:
    """A conversation about an image, or about none, which goes on with every question, whichever model answers it.

    Raises UserError if the image is missing, unreadable or larger than `max_pixels`.
    """

    def __init__(self, image: Path | None, task: str | None, max_pixels: int) -> None:
        self.task = task or ""
        self.images = [] if image is None else [_located(image)]
        for file in self.images:
            _check(file, max_pixels)
        self.turns: list[Turn] = []
        self.tasks: list[str] = []  # of the answers among them

    def ask(self, session: Session, question: str, on_text: Callable[[str], None] | None = None) -> str:
        """The answer to a question behind all that was said; `on_text` is told its parts as they are generated."""
        asked = question_about([] if self.turns else self.images, question)["turns"]
        tasks = [*self.tasks, self.task]
        row: Conversation = {"turns": [*self.turns, *asked], "images": self.images, "task": self.task, "tasks": tasks}
        with session.evaluating():
            [answer] = generate_answers(session, [row], streamer=on_text and Streamer(session.collator, on_text))
        self.turns, self.tasks = [*row["turns"][:-1], {"role": "assistant", "text": answer}], tasks
        return answer.strip()


def _located(image: Path) -> ImageFile:
    try:
        return locate(image, Path(), "--image")
    except UserError as error:  # whose fix is for rows of data
        raise UserError(error.what, where=str(image), fix=path_meant(image) or "Check the path.") from None


def _check(file: ImageFile, max_pixels: int) -> None:
    """Decode the image, whole: what is wrong with it is told before it is asked about."""
    try:
        check_body(file, max_pixels)
    except UserError as error:  # whose fix is for rows of data
        fix = error.fix.replace("remove the sample", "take another image")
        raise UserError(error.what, where=error.where, fix=fix) from None


class Streamer(TextStreamer):
    """Tells the text of an answer as its words are complete, as `Collator.text_of`."""

    def __init__(self, collator: Collator, on_text: Callable[[str], None]) -> None:
        reader: Any = SimpleNamespace(decode=collator.text_of)  # all that TextStreamer asks of a tokenizer
        super().__init__(reader, skip_prompt=True)
        self.on_text = on_text

    def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
        """Called by transformers."""
        self.on_text(text)
