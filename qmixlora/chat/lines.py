"""A chat in lines: a question, or what a line that begins with a slash asks for."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

from qmixlora.errors import UserError

from .dialogue import Dialogue
from .speakers import OWN, Speakers, factors_at_work

NOTHING = "(The model ended its answer at once.)"
NO_IMAGE = "(No image: it answers from the text alone.{how})"
SHOWN = 8  # factors of a routing


@dataclass
class Chat:
    """A chat with a run, an export or a model: lines to answers, and to what they ask of the chat itself."""

    folder: Path
    image: Path | None
    task: str | None
    on_text: Callable[[str], None]

    def __post_init__(self) -> None:
        self.speakers, self.speaker = Speakers(self.folder), OWN
        self.dialogue = self._dialogue(self.image)
        self.at_work: tuple[dict[int, float], int] | None = None  # for the last question

    def say(self, line: str) -> str | None:
        """Answer a line: what there is to say beside the streamed answer, if anything.

        Raises UserError for a command that is none, or cannot be followed.
        """
        if line.startswith("/"):
            return self._obey(*line[1:].partition(" ")[::2])
        is_first = not self.dialogue.images and not self.dialogue.turns
        notes = [NO_IMAGE.format(how=" /image FILE shows one.")] if is_first else []
        with self.speakers.speaking(self.speaker) as session:
            if not self.dialogue.ask(session, line, self.on_text):
                notes.append(NOTHING)
            self.at_work = factors_at_work(session)
        return "\n".join(notes) or None

    def _dialogue(self, image: Path | None) -> Dialogue:
        return Dialogue(image, self.task, self.speakers.recipe.data.max_pixels)

    def _obey(self, name: str, value: str) -> str:
        if name not in COMMANDS:
            raise UserError(f"There is no command /{name}.", where="chat", fix=f"There are: {self.help()}")
        return COMMANDS[name][0](self, value.strip())

    def help(self, value: str = "") -> str:
        """All commands."""
        return ", ".join(f"/{name} ({what})" for name, (_, what) in COMMANDS.items())

    def new(self, value: str = "") -> str:
        """Forget what was said."""
        self.dialogue = self._dialogue(self.image)
        return "A new conversation."

    def switch_task(self, value: str) -> str:
        """Route on another task from now on."""
        self.task = value or None
        self.dialogue.task = value
        mixture = self.speakers.mixture
        if mixture is None or mixture.route_on != "task":
            return f"Task: {value or 'none'}. (Nothing is routed on it.)"
        known = mixture.tasks or []
        mean = "" if value in known else f" It is none of {', '.join(known)}, whose mean is taken."
        return f"Task: {value or 'none'}.{mean}"

    def show(self, value: str) -> str:
        """Begin a new conversation about another image, or none."""
        try:
            image = Path(value).expanduser() if value else None
        except RuntimeError as error:
            raise UserError(str(error), where=value, fix="Write the path in full.") from None
        self.dialogue = self._dialogue(image)
        self.image = image
        return f"A new conversation about {image or 'no image'}."

    def switch_speaker(self, value: str) -> str:
        """Go on with an export of the run, by its folder's name, with its backbone, or with the run itself."""
        if value not in self.speakers.names:
            there = ", ".join(self.speakers.names)
            raise UserError(
                f"There is no export {value!r}.", where=str(self.folder / "exports"), fix=f"There are: {there}."
            )
        with self.speakers.speaking(value):
            self.speaker = value
        return f"Now {value}; the conversation goes on."

    def routing(self, value: str = "") -> str:
        """The factors that worked most for the last question, with their shares of the gates, over all layers."""
        if not self.dialogue.turns:
            return "Nothing was asked yet."
        if self.at_work is None:
            return "This model routes nothing."
        shares, layers = self.at_work
        told = ", ".join(f"{factor}: {share:.0%}" for factor, share in islice(shares.items(), SHOWN))
        return f"Factors of pool A for the last question, mean of {layers} layers: {told}."


COMMANDS: Mapping[str, tuple[Callable[[Chat, str], str], str]] = {
    "task": (Chat.switch_task, "TASK"),
    "image": (Chat.show, "FILE, a new conversation"),
    "export": (Chat.switch_speaker, "NAME, backbone, or run"),
    "routing": (Chat.routing, "the factors that worked"),
    "new": (Chat.new, "conversation"),
    "help": (Chat.help, "this"),
}
