"""Templates of questions: text with the names of columns in braces."""

from __future__ import annotations

from collections.abc import Iterator
from string import Formatter

OPEN, NAMED = "{question}", "{question}\n{options}"  # the templates of data without and with options


def parts(template: str) -> Iterator[tuple[str, str | None]]:
    """Text and the name that follows it (None at the end), in the order of the template; `{{` and `}}` are braces.

    Raises:
        ValueError: braces that do not match, or more than a name in them.
    """
    for text, name, form, conversion in Formatter().parse(template):
        if name is not None and (form or conversion or not name.isidentifier()):
            raise ValueError(f"{{{name}}} is more than the name of a column in braces")
        yield text, name


def names(template: str) -> list[str]:
    """The names in a template, in their order. Raises ValueError as `parts`."""
    return [name for _, name in parts(template) if name is not None]
