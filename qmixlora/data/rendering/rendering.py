"""What a chat template makes of conversations, in words: how answers end, and where generation would differ."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from qmixlora.data.formats import Conversation, Turn, to_messages
from qmixlora.errors import UserError

from .collate import Collator
from .letters import END, START
from .template import ChatTemplate


@dataclass(frozen=True)
class Rendering:
    """How a chat template writes conversations.

    `end_token` ends every answer; `writes_end`: the template writes it (else it is added). `asked` and `trained` stand
    before an answer in generation and in training.
    """

    end_token: str
    writes_end: bool
    asked: str
    trained: str
    is_append_only: bool
    keeps_thoughts: bool

    @property
    def is_true_beginning(self) -> bool:
        """Whether training saw what generation begins with."""
        return self.trained.startswith(self.asked)

    def notes(self) -> list[str]:
        """What is worth telling, in sentences; the first says how answers end."""
        told = [f"Every answer ends in {self.end_token!r}, which generation stops at."]
        if not self.writes_end:
            told[0] += " The chat template writes no end: it is added in training and to earlier answers of prompts."
        if not self.is_true_beginning:
            told.append(
                f"Generation begins an answer with {self.asked!r}, but in training {self.trained!r} stands before it: "
                "what is generated begins where nothing was learned. Look for an argument of the chat template "
                "(model.template_arguments) that makes them one."
            )
        if not self.is_append_only:
            told.append(
                "The chat template writes an earlier answer otherwise than the last one: every answer of a "
                "conversation becomes a sample of its own."
            )
        elif not self.keeps_thoughts:
            told.append(
                "The chat template leaves the thoughts (</think>) out of earlier answers: every answer of a "
                "conversation behind one with thoughts becomes a sample of its own."
            )
        return told


def rendering_of(template: ChatTemplate) -> Rendering:
    """How a chat template writes conversations. Raises UserError if it cannot, or if nothing could end an answer."""
    asked, trained = template.asked_with
    return Rendering(
        template.end_token,
        template.written_end != "",
        asked,
        trained,
        template.is_append_only,
        template.keeps_thoughts,
    )


def rendering_problem(collator: Collator, row: Conversation) -> str | None:
    """What is wrong with a row's text in one sentence, if anything: it cannot be rendered, or the template changes its
    last answer, leaves out words of a question or of the system, or moves images or words of a question.
    """
    template, turns = collator.template, row["turns"]
    try:
        text = template.conversation(turns)
    except UserError as error:
        return error.what
    if not _is_written(template.letters.quote(turns[-1]["text"]), text):
        return "The chat template does not write the last answer as it stands in the data."
    told, asked = (_marks_of(template, turns, role) for role in ("system", "user"))
    if not all(mark in text for mark in told):
        return (
            "The chat template leaves out the system's words, or some of them: they are neither learned nor routed on."
        )
    if not all(mark in text for mark in asked):
        return "The chat template leaves out words of a question: they are neither learned nor routed on."
    done = 0
    for mark in asked:
        done = text.find(mark, done) + len(mark)
        if done < len(mark):
            return (
                "The chat template moves an image from its place in a question: write questions without speaking of "
                "the places of their images."
            )
    return None


def _is_written(answer: str, text: str) -> bool:
    """Whether a conversation's text has the answer where it is learned; its beginning may stand in the prompt, as
    `<think>` does.
    """
    before, _, rest = text.rpartition(START)
    learned = rest.partition(END)[0]
    begun = (at for at in range(1, len(answer)) if before.endswith(answer[:at]))
    return answer in learned or any(learned.startswith(answer[at:]) for at in begun)


def _marks_of(template: ChatTemplate, turns: Sequence[Turn], role: str) -> list[str]:
    """What stands, in this order, in a conversation's text for the words and images of a role's turns."""
    own = to_messages([turn for turn in turns if turn["role"] == role])
    return [
        template.image_mark if part["type"] == "image" else template.letters.quote(part["text"]).strip()
        for message in own
        for part in message["content"]
    ]
