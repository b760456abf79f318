"""The form in which a chat template takes the content of messages, role by role: a list of parts, or a string.

Published templates mix the two: a user's content, which holds images, is gone through part by part, and the system's or
an assistant's is printed as it is, so that Python's notation of a list would stand in the text, or nothing could be
rendered at all. vLLM looks for loops in the template's source and takes one form for all roles; here both forms are
rendered, and that is taken with which the words stand in the text.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

Message = dict[str, Any]
PROBE = "qmixloraprobe"  # a key of parts that stands in the text where a part is printed whole
WORDS = {role: f"words{role}words" for role in ("system", "user", "assistant")}  # no template writes any of them
CONVERSATIONS = {  # in which a role's words are looked for; the roles before it are settled by then
    "user": (("user",),),
    "assistant": (("user", "assistant"), ("user", "assistant", "user", "assistant")),
    "system": (("system", "user"), ("system", "user", "assistant")),  # some write them into the last question alone
}


def roles_of_strings(render: Callable[[Sequence[Message]], str]) -> frozenset[str]:
    """The roles whose content has to be a string, since a list would be printed whole or refused. `render` makes a text
    of messages, and an empty one of those that the template refuses.
    """
    strings: frozenset[str] = frozenset()
    for role in CONVERSATIONS:
        if _written(render, role, strings | {role}) > _written(render, role, strings):
            strings |= {role}
    return strings


def as_string(message: Message) -> Message:
    """A message without images whose content is a string."""
    return {**message, "content": "".join(part["text"] for part in message["content"])}


def _written(render: Callable[[Sequence[Message]], str], role: str, strings: frozenset[str]) -> int:
    """How often a role's words are written, with strings as the content of `strings`; 0 where a list is printed."""
    texts = [render([_message(own, role, strings) for own in roles]) for roles in CONVERSATIONS[role]]
    return 0 if any(PROBE in text for text in texts) else sum(text.count(WORDS[role]) for text in texts)


def _message(role: str, probed: str, strings: frozenset[str]) -> Message:
    part = {"type": "text", "text": WORDS[role], **({PROBE: PROBE} if role == probed else {})}
    message = {"role": role, "content": [part]}
    return as_string(message) if role in strings else message
