"""The form of contents that a chat template takes, lists or strings, is found out for each role."""

from __future__ import annotations

from typing import Any

import pytest

from qmixlora.data import IMAGE, Collator
from qmixlora.data.rendering.content import roles_of_strings
from qmixlora.data.rendering.letters import END, START
from qmixlora.export.fingerprints import as_asked
from qmixlora.serving.fingerprint import has_image
from qmixlora.serving.stock import _for_transformers

from ..chats import CHATML, Chat, processor_of

PICTURE = "<start><image><end>"
PARTS = "{% for part in message.content %}{{ '" + PICTURE + "' if part.type == 'image' else part.text }}{% endfor %}"
ASKS = "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
LISTS = CHATML.replace("IMAGE", PICTURE)
ONE_FOR_ALL = "{% for message in messages %}<|im_start|>{{ message.role }}\nCONTENT<|im_end|>\n{% endfor %}" + ASKS
PRINTED = (  # the user's parts, and whatever others say: as GLM-4.1V's
    "{% for message in messages %}<|im_start|>{{ message.role }}\n{% if message.role == 'user' %}"
    + PARTS
    + "{% else %}{{ message.content }}{% endif %}<|im_end|>\n{% endfor %}"
    + ASKS
)
ADDED = (  # the system's words are added to a string: as LFM2.5-VL's
    "{% if messages[0].role == 'system' %}{{ '<|im_start|>system\n' + messages[0].content + '<|im_end|>\n' }}"
    "{% endif %}{% for message in messages if message.role != 'system' %}<|im_start|>{{ message.role }}\n"
    + PARTS
    + "<|im_end|>\n{% endfor %}"
    + ASKS
)
LAST = (  # and only in the last question: as Pixtral's
    "{% for message in messages if message.role != 'system' %}<|im_start|>{{ message.role }}\n"
    "{% if loop.last and message.role == 'user' and messages[0].role == 'system' %}"
    "{{ messages[0].content + '\n\n' }}{% endif %}" + PARTS + "<|im_end|>\n{% endfor %}" + ASKS
)
TRIMMED = (  # a string's filter makes Python's notation of a list; not beside pictures: as Llama 3.2 Vision's
    "{% set told = '' %}{% if messages[0].role == 'system' %}{% set told = messages[0].content | trim %}"
    "{% set messages = messages[1:] %}{% endif %}"
    "{% for message in messages %}{% for part in message.content if part.type == 'image' and told %}"
    "{{ raise_exception('no system beside images') }}{% endfor %}{% endfor %}"
    "{% if told %}<|im_start|>system\n{{ told }}<|im_end|>\n{% endif %}" + LISTS
)
FORMS = [
    (LISTS, ()),
    (PRINTED, ("assistant", "system")),
    (ADDED, ("system",)),
    (LAST, ("system",)),
    (TRIMMED, ("system",)),
    (ONE_FOR_ALL.replace("CONTENT", "{{ message.content }}"), ("assistant", "system", "user")),
    (ONE_FOR_ALL.replace("CONTENT", "{{ message.content | tojson }}"), ("assistant", "system", "user")),
    (ONE_FOR_ALL.replace("CONTENT", "{{ message.content[0].text }}"), ()),
    (LISTS + "{{ raise_exception('one question') if messages | length > 2 }}", ()),
    (LISTS + "{{ raise_exception('no system') if messages[0].role == 'system' }}", ()),
]


def collator_of(template: str) -> Collator:
    return Collator(processor_of(Chat("qwen3_vl", "bytes", template, "")), 1000)


def turns_of(system: str, *texts: str) -> list[Any]:
    roles = ("user", "assistant")
    asked = [{"role": roles[index % 2], "text": text} for index, text in enumerate(texts)]
    return [{"role": "system", "text": system}, *asked] if system else asked


@pytest.mark.parametrize(("template", "strings"), FORMS)
def test_roles_have_strings_where_a_list_would_be_printed_or_refused(template: str, strings: tuple[str, ...]) -> None:
    assert sorted(roles_of_strings(collator_of(template).template._unless_refused)) == list(strings)


@pytest.mark.parametrize("template", [PRINTED, ADDED, LISTS])
def test_words_of_every_role_stand_in_the_text_with_pictures_in_their_places(template: str) -> None:
    conversation = collator_of(template).template.conversation
    turns = turns_of(" Be terse. ", f"{IMAGE}\nhow", " yes ", f"and {IMAGE} ?", "no")
    said = [
        "system\n Be terse. <|im_end|>", f"user\n{PICTURE}how<|im_end|>", f"assistant\n{START} yes <|im_end|>{END}",
        f"user\nand {PICTURE} ?<|im_end|>", f"assistant\n{START}no<|im_end|>{END}",
    ]  # fmt: skip
    assert conversation(turns) == "".join(f"<|im_start|>{text}\n" for text in said)
    assert conversation(turns[1:]) == "".join(f"<|im_start|>{text}\n" for text in said[1:])


def test_the_systems_words_stand_in_the_last_question_where_the_template_writes_them_there() -> None:
    template = collator_of(LAST).template
    turns = turns_of("Be terse.", f"{IMAGE}how", "yes", "more", "no")
    prompt = template.prompt(turns)
    assert prompt.endswith("<|im_start|>user\nBe terse.\n\nmore<|im_end|>\n<|im_start|>assistant\n")
    assert template.conversation(turns) == f"{prompt}{START}no<|im_end|>{END}\n"
    assert not template.teaches_all(turns) and template.teaches_all(turns[1:])


def test_what_is_routed_on_has_the_systems_words_and_no_notation() -> None:
    collator = collator_of(TRIMMED)
    batch = collator([{"turns": turns_of("You are terse.", "how", "yes"), "images": [], "task": "t"}])
    routed = collator.processor.tokenizer.decode(batch["input_ids"][0][batch["routing_mask"][0]])
    assert "system\nYou are terse.<|im_end|>" in routed and "type" not in routed


@pytest.mark.parametrize("template", [PRINTED, LISTS])
def test_stock_libraries_are_asked_what_a_run_asks(template: str) -> None:
    """In an export's fingerprint, whose messages go to servers, too."""
    collator = collator_of(template)
    turns = turns_of("Be terse.", "how", "yes")
    messages = as_asked(collator.template, {"turns": turns, "images": [], "task": "t"}, [])
    stock = collator.processor.apply_chat_template(
        [_for_transformers(message) for message in messages], add_generation_prompt=True
    )
    assert stock == collator.template.prompt(turns) and "Be terse." in stock and "type" not in stock
    assert not has_image(messages)
