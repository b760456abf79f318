"""A chat template that writes the date is told, with the argument that fixes the day."""

from __future__ import annotations

from datetime import datetime
from typing import Any

import pytest

from qmixlora.data import IMAGE, Collator
from qmixlora.data.rendering.dates import date_problem

from ..chats import CHATML, Chat, processor_of

PLAIN = CHATML.replace("IMAGE", "<start><image><end>")
FREE = "{% if day is not defined %}{% set day = strftime_now('%d %b %Y') %}{% endif %}"
OWN = "{% set day = strftime_now('%Y') %}"
IN_TEXTS = "{% if messages[0].content[0].type != 'image' %}Today: {{ day }}\n{% endif %}"  # not beside images


def row_of(text: str) -> Any:
    turns = [{"role": "user", "text": text}, {"role": "assistant", "text": "no"}]
    return {"turns": turns, "images": [], "task": "t"}


@pytest.mark.parametrize(
    ("template", "arguments", "words"),
    [
        (PLAIN, {}, None),
        (FREE + PLAIN, {}, None),  # asked for and not written
        (FREE + IN_TEXTS + PLAIN, {}, "fix it: model.template_arguments: {day: '"),
        (FREE + IN_TEXTS + PLAIN, {"day": "26 Jul 2024"}, None),
        (OWN + IN_TEXTS + PLAIN, {}, "in the chat_template.jinja of a local copy"),
        ("Today: {{ strftime_now('%Y') }}\n" + PLAIN, {}, "in the chat_template.jinja of a local copy"),
    ],
)
def test_a_date_in_the_text_is_told_with_what_fixes_it(
    template: str, arguments: dict[str, str], words: str | None
) -> None:
    collator = Collator(processor_of(Chat("qwen3_vl", "bytes", template, "")), 1000, arguments)
    told = date_problem(collator.template)(row_of("Is it red ?"))
    assert told is None if words is None else words in str(told)


def test_what_fixes_the_day_has_the_templates_own_form() -> None:
    template = Collator(processor_of(Chat("qwen3_vl", "bytes", FREE + IN_TEXTS + PLAIN, "")), 1000).template
    day = str(date_problem(template)(row_of("Is it red ?"))).partition("{day: '")[2].partition("'}")[0]
    assert abs(datetime.now() - datetime.strptime(day, "%d %b %Y")).days <= 2


def test_only_rows_with_the_date_are_told() -> None:
    template = Collator(processor_of(Chat("qwen3_vl", "bytes", FREE + IN_TEXTS + PLAIN, "")), 1000).template
    told = date_problem(template)
    assert told(row_of("Is it red ?")) is not None
    assert told(row_of(f"{IMAGE}Is it red ?")) is None
