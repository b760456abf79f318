"""The fingerprint of an export, `fingerprint.json`: a few prompts, and what the export answers to them.

Answers are greedy, in tokens with their log-probabilities, by stock transformers and PEFT on the weights as they are
served (not on those that training had in 4 bits). Beside the export's own stand those of models that a server may take
for it: the base without it, the base before the projector was trained, the export without its projector.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from qmixlora.errors import UserError
from qmixlora.files import clear_read_errors, write_json

FINGERPRINT = "fingerprint.json"
VERSION = 1
EXPORT, BASE, ORIGINAL, NO_PROJECTOR = "export", "base", "original", "without_projector"  # whose answers
AGAIN = "Export again; for an adapter of another tool: qmixlora check --adapter DIR --base MODEL."
Message = dict[str, Any]  # of OpenAI's protocol, images as data URIs


@dataclass(frozen=True)
class Step:
    """A token that was chosen, its log-probability (None where a server tells none), and others by theirs.

    `token` is an id, `text` the token as text; a server may tell one of them.
    """

    token: int | None
    text: str
    logprob: float | None
    others: Mapping[int | str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class Answer:
    """An answer: its steps (none where a server tells no tokens), its text, and the prompt's length in tokens."""

    steps: tuple[Step, ...]
    text: str
    prompt_tokens: int | None


@dataclass(frozen=True)
class Prompt:
    """A prompt and its answers by whose they are; one of them is the export's."""

    messages: list[Message]
    answers: dict[str, Answer]

    @property
    def has_image(self) -> bool:
        return has_image(self.messages)


@dataclass(frozen=True)
class Fingerprint:
    """The prompts of an export and their answers.

    `name` is what a server may call it, `form` is `lora`, `gguf`, `merged` or `base`; `dtype` is that of the
    computation, `max_tokens` the most tokens of an answer; `template_arguments` go to the chat template.
    """

    name: str
    form: str
    dtype: str
    max_tokens: int
    prompts: list[Prompt]
    template_arguments: dict[str, Any] = field(default_factory=dict)
    versions: dict[str, str] = field(default_factory=dict)

    @property
    def is_adapter(self) -> bool:
        """Whether the export lies on a base."""
        return self.form in ("lora", "gguf")

    def write(self, folder: Path) -> None:
        """Write `fingerprint.json`, without the tokens that were not chosen."""
        content = asdict(self)
        for prompt in content["prompts"]:
            for answer in prompt["answers"].values():
                for step in answer["steps"]:
                    del step["others"]
        write_json(folder / FINGERPRINT, {"version": VERSION, **content})


def has_image(messages: list[Message]) -> bool:
    """Whether an image stands in messages."""
    contents = [message["content"] for message in messages]
    return any(part["type"] != "text" for own in contents if not isinstance(own, str) for part in own)


def read_fingerprint(folder: Path) -> Fingerprint:
    """The fingerprint of an export. Raises UserError if it has none, or one that is broken or of a later release."""
    path = folder / FINGERPRINT
    if not path.is_file():
        raise UserError("There is no fingerprint to check by.", where=str(path), fix=AGAIN)
    with clear_read_errors(path, AGAIN):
        content = json.loads(path.read_text(encoding="utf-8"))
        if content.pop("version") > VERSION:
            raise UserError("The fingerprint is of a later release.", where=str(path), fix="Upgrade qmixlora.")
        prompts = [_prompt(prompt) for prompt in content.pop("prompts")]
        return Fingerprint(prompts=prompts, **content)


def _prompt(content: Mapping[str, Any]) -> Prompt:
    answers = {}
    for whose, answer in content["answers"].items():
        steps = tuple(Step(step["token"], step["text"], step["logprob"]) for step in answer["steps"])
        answers[whose] = Answer(steps, answer["text"], answer["prompt_tokens"])
    return Prompt(list(content["messages"]), answers)
