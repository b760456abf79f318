"""A processor's chat template: conversations to text in which the supervised spans are marked.

An answer stands between two marks when the template is rendered, once for a whole conversation. A supervised span
begins where the generation prompt would end, and ends with the token that generation stops at.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Mapping, Sequence
from functools import cache, cached_property
from typing import Any

from transformers import ProcessorMixin

from qmixlora.data.formats import IMAGE, Turn, to_messages
from qmixlora.errors import UserError

from .content import Message, as_string, roles_of_strings
from .control import check_sayable, control_of, sayable_of
from .letters import END, START, Letters

_SPAN = re.compile(f"{START}(.*?){END}", re.DOTALL)
_THOUGHT = "</think>"  # what templates look for in an answer, to leave out the thoughts of earlier ones
_ANSWER = "answer"
_SHOWN: Turn = {"role": "user", "text": f"{IMAGE}question"}
_TURNS: list[Turn] = [
    {"role": "user", "text": "question"},
    {"role": "assistant", "text": _ANSWER},
    {"role": "user", "text": "question"},
    {"role": "assistant", "text": _ANSWER},
]


class ChatTemplate:
    """A processor's chat template with the arguments that a recipe gives it, and the control tokens that it lets data
    say (`data.special_tokens`).
    """

    def __init__(
        self, processor: ProcessorMixin, arguments: Mapping[str, Any], special_tokens: Collection[str] = ()
    ) -> None:
        self.processor = processor
        self.special_tokens = frozenset(special_tokens)
        self.arguments = dict(arguments)
        for name in self.arguments:
            if not re.search(rf"\b{re.escape(name)}\b", str(processor.chat_template)):
                raise UserError(
                    f"The model's chat template knows nothing of {name!r}.", where="model.template_arguments"
                )

    def conversation(self, turns: Sequence[Turn]) -> str:
        """A conversation, every answer in START and END; the last one alone if not `teaches_all`.

        What stands before the last answer is what generation begins with, wherever the template lets an answer be asked
        for as it was trained: some write the system's words where a question is the last turn, and only there.

        Raises UserError if the template cannot render it, or leaves out a part of an earlier answer.
        """
        before, _, answer = self._conversation(turns).rpartition(START)
        asked, trained = self.asked_with
        if trained.startswith(asked):
            prompt = self.prompt(turns)
            if before != prompt and prompt.startswith(before):
                raise UserError("The chat template rewrites both the last question and its answer once it is answered.")
            before = prompt
        return before + START + answer

    def _conversation(self, turns: Sequence[Turn]) -> str:
        """A conversation as the template writes it, with marks as in `conversation`."""
        if self.teaches_all(turns):
            if (text := self._marked(turns, prompt=False)) is not None:
                return text
            if (earlier := self._marked(turns[:-1], prompt=True)) is not None:  # the last answer alone is rewritten
                return self._last_alone(turns, earlier)
            raise UserError(
                "The chat template does not write every answer as it stands in the data.",
                fix="Make one sample of each answer.",
            )
        marked = self._marked(turns, prompt=False, last_alone=True)
        return marked or self._last_alone(turns, self._rendered(self._messages(turns[:-1]), prompt=True))

    def prompt(self, turns: Sequence[Turn]) -> str:
        """What generation begins with for the last answer: a conversation up to it, and what the template writes to ask
        for an answer. Earlier answers as in `conversation`. Raises UserError if the template cannot render it.
        """
        before = turns[:-1]
        text = self._marked(before, prompt=True) if self.teaches_all(turns) else None
        return self._rendered(self._messages(before), prompt=True) if text is None else text

    def teaches_all(self, turns: Sequence[Turn]) -> bool:
        """Whether all answers of a conversation stand in it as they were generated; else only its last one does.

        (The last one has no say in it: what it will be is not known when it is asked for.)
        """
        if not self._appends(turns[0]["role"] == "system"):
            return False
        return self.keeps_thoughts or not any(_THOUGHT in answer for answer in answers_of(turns)[:-1])

    def messages(self, turns: Sequence[Turn]) -> list[Message]:
        """Turns as messages for `apply_chat_template`, in the form that the template takes, nothing in them quoted."""
        return self._in_form(to_messages(turns))

    @cached_property
    def letters(self) -> Letters:
        """What encodes the control tokens that data quotes: all of `control_of` but those that the recipe lets it say
        (`<think>`, which stands before the last answer alone, is none). Raises UserError as `check_sayable`.
        """
        if "user" in self._roles_of_strings:
            raise UserError(
                "The model's chat template reads no messages whose content is a list of texts and images.",
                where="the model's processor",
                fix="Use the chat template of its processor (chat_template.jinja), not of its tokenizer alone.",
            )
        check_sayable(self.special_tokens, self.processor, self._written)
        control = control_of(self.processor, self._written) - self.special_tokens
        return Letters(self.processor.tokenizer, control)

    @cached_property
    def sayable(self) -> frozenset[str]:
        """The control tokens that data may say (`data.special_tokens`) and does not: see `sayable_of`."""
        return sayable_of(self.processor, self._written) - self.special_tokens

    @cached_property
    def _written(self) -> str:
        """What the template writes around texts, an earlier answer and an image."""
        text = self._unless_refused(self.messages(_TURNS[:3])) or self._rendered(self.messages(_TURNS[:2]))
        return text + self._unless_refused(self.messages([_SHOWN]))

    @cached_property
    def image_mark(self) -> str:
        """The first control token that the template writes for an image; empty if it writes none."""
        text, without = (self._unless_refused(self.messages([turn])) for turn in (_SHOWN, _TURNS[0]))
        marks = [token for token in self.letters.control if text.count(token) > without.count(token)]
        return min(marks, key=lambda token: (text.index(token), -len(token)), default="")

    @cached_property
    def written_end(self) -> str:
        """What the template writes after an answer, up to the first control token; empty if it writes none."""
        *_, after = self._rendered(self.messages(_TURNS[:2])).rpartition(_ANSWER)
        ends = [token for token in self.letters.control if token in after]
        if not ends:
            return ""
        first = min(ends, key=lambda token: (after.index(token), -len(token)))
        return str(after[: after.index(first) + len(first)])

    @cached_property
    def end_token(self) -> str:
        """The token that every answer ends in: the template's own, else the tokenizer's end of text.

        Raises UserError if there is none.
        """
        eos = self.processor.tokenizer.eos_token
        if not self.written_end and not eos:
            raise UserError(
                "Nothing ends an answer: the chat template writes no token after it, and the tokenizer has none.",
                where="the model's processor",
                fix="Name an eos_token in tokenizer_config.json of a local copy.",
            )
        ends = [token for token in self.letters.control if self.written_end.endswith(token)]
        return ends[0] if self.written_end else str(eos)

    @cached_property
    def is_append_only(self) -> bool:
        """Whether an earlier answer stands in a conversation as it stood when it was the last, and as it was asked for,
        in conversations with a system's words, too.
        """
        return self._appends(False) and self._appends(True)

    @cached_property
    def _appends(self) -> Callable[[bool], bool]:
        """`is_append_only` of conversations without or with a system's words (true where the template takes none)."""

        def appends(is_instructed: bool) -> bool:
            turns: list[Turn] = [{"role": "system", "text": "system"}, *_TURNS] if is_instructed else _TURNS
            alone = self._unless_refused(self._messages(turns[:-2], START, END))
            if is_instructed and not alone:
                return True
            followed = self._unless_refused(self._messages(turns, START, END))
            asked = self._unless_refused(self._messages(turns[:-3]), prompt=True).removesuffix(self.asked_with[0])
            is_kept = START in alone and END in alone and followed.startswith(alone.partition(END)[0] + END)
            return is_kept and followed.startswith(asked)

        return cache(appends)

    @cached_property
    def keeps_thoughts(self) -> bool:
        """Whether `<think>` ... `</think>` in an answer stays where it is."""
        thought = f"<think>\nthought\n{_THOUGHT}\n\n{_ANSWER}"
        turns: list[Turn] = [{**turn, "text": thought} if turn["role"] == "assistant" else turn for turn in _TURNS]
        text = self._unless_refused(self._messages(turns, START, END))
        return _SPAN.findall(text) == [self.letters.quote(thought)] * 2

    @cached_property
    def asked_with(self) -> tuple[str, str]:
        """(generation prompt, trained): what follows a question when an answer is asked for, and in training before the
        answer. The former is a beginning of the latter, or generation begins with what training never saw.
        """
        question = self._rendered(self.messages(_TURNS[:1]))
        asked = self._rendered(self.messages(_TURNS[:1]), prompt=True)
        trained = self._rendered(self.messages(_TURNS[:2])).rpartition(_ANSWER)[0]
        shared = min(_shared(question, asked), _shared(question, trained))
        return asked[shared:], trained[shared:]

    @cached_property
    def _said_before(self) -> str:
        """What the template writes between the generation prompt and an answer: generated, too."""
        asked, trained = self.asked_with
        return trained[_shared(asked, trained) :]

    def _marked(self, turns: Sequence[Turn], prompt: bool, last_alone: bool = False) -> str | None:
        """A conversation with START and END around what is supervised; None if an answer is not as it was."""
        before_last = self._messages(turns[:-1]) if last_alone else []
        text = self._rendered([*before_last, *self._messages(turns[len(before_last) :], START, END)], prompt)
        expected = [self.letters.quote(answer) for answer in answers_of(turns[len(before_last) :])]
        if _SPAN.findall(text) != expected or text.count(START) + text.count(END) != 2 * len(expected):
            return None
        before, end, pieces, done = self._said_before, self.written_end, [], 0
        for span in _SPAN.finditer(text):
            start, stop = span.start() - len(before), span.end()
            if start < done or text[start : span.start()] != before:
                return None
            ending = end if text.startswith(end, stop) and end else self.end_token
            pieces += [text[done:start], START, before, span.group(1), ending, END]
            done = stop + (len(end) if text.startswith(end, stop) else 0)
        return "".join([*pieces, text[done:]])

    def _last_alone(self, turns: Sequence[Turn], asked: str) -> str:
        """A conversation with START and END around its last answer, which is found by what is generated for it. `asked`
        is what stands before it: a prompt, in which earlier answers may be marked.
        """
        prompt = self._rendered(self._messages(turns[:-1]), prompt=True)
        whole = self._rendered(self._messages(turns), prompt=False)
        start = _shared(prompt, whole)
        before = asked.removesuffix(prompt[start:])  # of a generation prompt, what training does not begin with
        stop = whole.rfind(self.written_end, start) if self.written_end else -1
        if stop < 0:
            stop = len(whole.rstrip())
            return f"{before}{START}{whole[start:stop]}{self.end_token}{END}{whole[stop:]}"
        stop += len(self.written_end)
        return f"{before}{START}{whole[start:stop]}{END}{whole[stop:]}"

    def _messages(self, turns: Sequence[Turn], start: str = "", end: str = "") -> list[Message]:
        """Messages whose texts can be tokenised; answers as they stand, white space and all, between two marks."""
        messages = to_messages(turns)
        for turn, message in zip(turns, messages, strict=True):
            if turn["role"] == "assistant":
                message["content"] = [{"type": "text", "text": start + self.letters.quote(turn["text"]) + end}]
            else:
                for part in message["content"]:
                    if part["type"] == "text":
                        part["text"] = self.letters.quote(part["text"])
        return self._in_form(messages)

    def _in_form(self, messages: Sequence[Message]) -> list[Message]:
        """Messages whose content has the form that the template takes of their roles."""
        return [as_string(own) if own["role"] in self._roles_of_strings else own for own in messages]

    @cached_property
    def _roles_of_strings(self) -> frozenset[str]:
        return roles_of_strings(self._unless_refused)

    def _unless_refused(self, messages: Sequence[Message], prompt: bool = False) -> str:
        """Messages as text; none where the template takes no such conversation."""
        try:
            return self._rendered(messages, prompt)
        except UserError:
            return ""

    def _rendered(self, messages: Sequence[Message], prompt: bool = False) -> str:
        try:
            return str(
                self.processor.apply_chat_template(list(messages), add_generation_prompt=prompt, **self.arguments)
            )
        except Exception as error:  # jinja2's own, raise_exception of the template, and whatever its filters raise
            raise UserError(
                f"The model's chat template cannot render this conversation: {error}",
                fix="It may ask for other roles, for another order of them, or for no images there.",
            ) from error


def answers_of(turns: Sequence[Turn]) -> list[str]:
    """The answers of a conversation."""
    return [turn["text"] for turn in turns if turn["role"] == "assistant"]


def _shared(first: str, second: str) -> int:
    """The length of the common beginning."""
    pairs = enumerate(zip(first, second, strict=False))
    return next((index for index, (a, b) in pairs if a != b), min(len(first), len(second)))
