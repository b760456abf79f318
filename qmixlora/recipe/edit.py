"""Edits of a recipe: values by dotted path, as on the command line (`train.learning_rate=1e-3`)."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import yaml

from qmixlora.errors import UserError

from .migration import migrated
from .schema import Recipe
from .section import Section, section_in
from .strict_yaml import dump_yaml, load_yaml
from .validation import validate


@dataclass(frozen=True)
class Edit:
    """New values of a recipe by their paths."""

    values: Mapping[str, Any]

    @classmethod
    def parse(cls, overrides: Sequence[str]) -> Edit:
        """Read overrides as they are typed, each `section.key=value` with a YAML value (nothing: null); keys of earlier
        releases become those of today.

        Raises:
            UserError: an override has another form, its value is not YAML, or as `migrated`.
        """
        values: dict[str, Any] = {}
        for override in overrides:
            path, separator, text = override.partition("=")
            if not separator or not path:
                raise UserError(f"An override has the form section.key=value, not {override!r}.", where="command line")
            try:
                values[path] = load_yaml(text) if text else None
            except yaml.YAMLError as error:
                what = f"{text!r} is not a YAML value: {getattr(error, 'problem', error)}."
                raise UserError(what, where=f"override {override!r}", fix="Quote it, if it is text.") from None
        return cls(migrated(values)[0])

    def apply(self, recipe: Recipe) -> Recipe:
        """The recipe with the new values. Raises UserError if one is wrong, or they do not go together."""
        return validate(self.put_into(recipe.model_dump()), str(self))

    def put_into(self, sections: dict[str, Any]) -> dict[str, Any]:
        """Put the values into nested sections, in place. Raises UserError where a value stands for a section."""
        for path, value in self.values.items():
            *parents, key = path.split(".")
            target = sections
            for parent in parents:
                target[parent] = {} if target.get(parent) is None else target[parent]  # a section that is not there yet
                target = target[parent]
                if not isinstance(target, dict):
                    raise UserError(f"{parent!r} is a value, not a section.", where=f"override {path!r}")
            target[key] = value
        return sections

    def overrides(self) -> list[str]:
        """The edit as it is typed."""
        return [f"{path}={_as_typed(value)}" for path, value in self.values.items()]

    def yaml(self) -> str:
        """The edit as sections of a recipe."""
        return dump_yaml(self.put_into({}))

    def __str__(self) -> str:
        return " ".join(self.overrides())

    def __or__(self, later: Edit) -> Edit:
        """Both edits, the later one's values where they meet."""
        return Edit({**self.values, **later.values})


def leaves(values: Mapping[str, Any], prefix: str = "", section: type[Section] = Recipe) -> Iterator[tuple[str, Any]]:
    """The values of a recipe by their dotted paths; what has keys of one's own, such as data.metrics, is one value."""
    for key, value in values.items():
        field = section.model_fields.get(key)
        inner = field and section_in(field.annotation)
        if inner and isinstance(value, Mapping) and value:
            yield from leaves(value, f"{prefix}{key}.", inner)
        else:
            yield f"{prefix}{key}", value


def _as_typed(value: Any) -> str:
    """A YAML value on one line; words that YAML reads as themselves stay bare."""
    if isinstance(value, str) and _reads_as_itself(value):
        return value
    quoted = '"' if isinstance(value, str) else None
    text = dump_yaml(value, default_style=quoted, default_flow_style=True, width=math.inf)
    return text.removesuffix("...\n").strip()  # the mark with which YAML ends a bare scalar


def _reads_as_itself(text: str) -> bool:
    try:
        return text == text.strip() and load_yaml(text) == text
    except yaml.YAMLError:
        return False


def edited(recipe: Recipe, overrides: Sequence[str]) -> Recipe:
    """The recipe with overrides applied. Raises UserError as `Edit.parse` and `Edit.apply`."""
    return Edit.parse(overrides).apply(recipe)
