"""Talking to a model: a conversation that goes on, and what a line that begins with a slash asks for.

Shapes: L layers, E factors in a pool.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from transformers import PreTrainedTokenizerBase, TextStreamer

from qmixlora.data import Collator, Conversation, ImageFile, Turn, check_header, locate, question_about
from qmixlora.errors import UserError
from qmixlora.mixlora import MixLoraModel
from qmixlora.session import Session, TunedSession, open_run

from .answers import generate_answers

OWN = "run"  # the name of the run itself among its exports
NOTHING = "(The model ended its answer at once.)"
NO_IMAGE = "(No image: it answers from the text alone. /image FILE shows one.)"
SHOWN = 8  # factors of a routing


class Dialogue:
    """A conversation about an image, or about none, which goes on with every question.

    Raises UserError if the image is missing, unreadable or too large.
    """

    def __init__(self, session: Session, image: Path | None, task: str | None) -> None:
        self.session, self.task = session, task or ""
        self.images: list[ImageFile] = [] if image is None else [locate(image, Path(), "--image")]
        for file in self.images:
            check_header(file, session.recipe.data.max_pixels)
        self.turns: list[Turn] = []

    def ask(self, question: str, on_text: Callable[[str], None] | None = None) -> str:
        """The answer to a question behind all that was said; `on_text` is told its parts as they are generated."""
        asked = question_about([] if self.turns else self.images, question)["turns"]
        row: Conversation = {"turns": [*self.turns, *asked], "images": self.images, "task": self.task}
        with self.session.evaluating():
            [answer] = generate_answers(self.session, [row], streamer=on_text and self._streamer(on_text))
        self.turns = [*row["turns"][:-1], {"role": "assistant", "text": answer}]
        return answer.strip()

    def _streamer(self, on_text: Callable[[str], None]) -> Streamer:
        collator = self.session.collator
        assert isinstance(collator, Collator), "a run has a processor"
        return Streamer(collator.processor.tokenizer, on_text)


class Streamer(TextStreamer):
    """Tells the text of an answer as its words are complete, without special tokens."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, on_text: Callable[[str], None]) -> None:
        super().__init__(tokenizer, skip_prompt=True, skip_special_tokens=True)
        self.on_text = on_text

    def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
        """Called by transformers."""
        self.on_text(text)


@dataclass
class Chat:
    """A chat with a run, an export or a model: lines to answers, and to what they ask of the chat itself."""

    folder: Path
    image: Path | None
    task: str | None
    on_text: Callable[[str], None]

    def __post_init__(self) -> None:
        self.session = open_run(self.folder)
        self.dialogue = Dialogue(self.session, self.image, self.task)

    def say(self, line: str) -> str | None:
        """Answer a line: what there is to say beside the streamed answer, if anything.

        Raises UserError for a command that is none, or cannot be followed.
        """
        if line.startswith("/"):
            return self._obey(*line[1:].partition(" ")[::2])
        notes = [NO_IMAGE] if not self.dialogue.images and not self.dialogue.turns else []
        if not self.dialogue.ask(line, self.on_text):
            notes.append(NOTHING)
        return "\n".join(notes) or None

    def _obey(self, name: str, value: str) -> str:
        if name not in COMMANDS:
            raise UserError(f"There is no command /{name}.", where="chat", fix=f"There are: {self.help()}")
        return COMMANDS[name][0](self, value.strip())

    def help(self, value: str = "") -> str:
        """All commands."""
        return ", ".join(f"/{name} ({what})" for name, (_, what) in COMMANDS.items())

    def new(self, value: str = "") -> str:
        """Forget what was said."""
        self.dialogue = Dialogue(self.session, self.image, self.task)
        return "A new conversation."

    def switch_task(self, value: str) -> str:
        """Route on another task from now on."""
        self.task = value or None
        self.dialogue.task = value
        return f"Task: {value or 'none'}."

    def show(self, value: str) -> str:
        """Begin a new conversation about another image, or none."""
        image = Path(value).expanduser() if value else None
        self.dialogue = Dialogue(self.session, image, self.task)
        self.image = image
        return f"A new conversation about {image or 'no image'}."

    def switch_export(self, value: str) -> str:
        """Go on with an export of the run, by its folder's name, or with the run itself."""
        exports = sorted(path.parent.name for path in (self.folder / "exports").glob("*/fidelity.json"))
        if value not in [OWN, *exports]:
            there = ", ".join([OWN, *exports])
            raise UserError(
                f"There is no export {value!r}.", where=str(self.folder / "exports"), fix=f"There are: {there}."
            )
        turns = self.dialogue.turns
        del self.session, self.dialogue  # two models may not fit
        self.session = open_run(self.folder if value == OWN else self.folder / "exports" / value)
        self.dialogue = Dialogue(self.session, self.image, self.task)
        self.dialogue.turns = turns
        return f"Now {value}; the conversation goes on."

    def routing(self, value: str = "") -> str:
        """The factors that worked most for the last question, with their shares of the gates, over all layers."""
        model = self.session.model.base_model if isinstance(self.session, TunedSession) else None
        if not isinstance(model, MixLoraModel):
            return "This model routes nothing."
        if not self.dialogue.turns:
            return "Nothing was asked yet."
        usage_LE = model.last_selection()[:, -1].sum(dim=2)
        share_E = (usage_LE / usage_LE.sum(dim=1, keepdim=True)).mean(dim=0)
        shares, factors = torch.topk(share_E, min(SHOWN, len(share_E)))
        told = ", ".join(
            f"{factor}: {share:.0%}" for factor, share in zip(factors.tolist(), shares.tolist(), strict=True)
        )
        return f"Factors of pool A for the last question, mean of {len(usage_LE)} layers: {told}."


COMMANDS: Mapping[str, tuple[Callable[[Chat, str], str], str]] = {
    "task": (Chat.switch_task, "TASK"),
    "image": (Chat.show, "FILE, a new conversation"),
    "export": (Chat.switch_export, f"NAME, or {OWN}"),
    "routing": (Chat.routing, "the factors that worked"),
    "new": (Chat.new, "conversation"),
    "help": (Chat.help, "this"),
}
