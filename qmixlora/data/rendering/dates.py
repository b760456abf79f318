"""Whether a chat template writes the day into conversations, which then differ from day to day."""

from __future__ import annotations

import copy
import re
from collections.abc import Callable
from datetime import datetime
from typing import Any

from qmixlora.data.formats import Conversation
from qmixlora.errors import UserError

from .template import ChatTemplate

CLOCK = "strftime_now"  # what transformers gives templates
OTHER = "qmixlora_clock"
DAYS = "a day", "another day"
VARIABLE = re.compile(r"\bset\s+(\w+)\s*=\s*" + CLOCK + r"\(\s*(['\"])(.*?)\2\s*\)")


def date_problem(template: ChatTemplate) -> Callable[[Conversation], str | None]:
    """A function that says of a row, in one sentence, that the template writes the date into its text, and how to fix
    the day; None where it does not, or where it cannot render the row.
    """
    if CLOCK not in str(template.processor.chat_template):
        return lambda row: None
    plain = _on_two_days(template, {})
    found = VARIABLE.search(str(template.processor.chat_template))
    fixed = _on_two_days(template, {found[1]: "fixed"}) if found else plain

    def told(row: Conversation) -> str | None:
        if not _differ(plain, row):
            return None
        what = "The chat template writes the date, so that what is learned and routed on changes with the day; "
        if found is None or _differ(fixed, row):
            return what + "write a day in its place in the chat_template.jinja of a local copy of the model."
        return what + f"fix it: model.template_arguments: {{{found[1]}: {datetime.now().strftime(found[3])!r}}}."

    return told


def _on_two_days(template: ChatTemplate, more: dict[str, Any]) -> list[ChatTemplate]:
    """The template, given more arguments, with two days in the place of the clock (which takes none as an argument)."""
    made = []
    for day in DAYS:
        processor = copy.copy(template.processor)
        source = str(processor.chat_template).replace(CLOCK, OTHER)
        processor.chat_template = f"{{% macro {OTHER}(form) %}}{day}{{% endmacro %}}{source}"
        made.append(ChatTemplate(processor, {**template.arguments, **more}, template.special_tokens))
    return made


def _differ(templates: list[ChatTemplate], row: Conversation) -> bool:
    try:
        first, second = (template.conversation(row["turns"]) for template in templates)
    except UserError:
        return False
    return first != second
