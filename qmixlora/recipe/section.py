"""What the sections of a recipe have in common."""

from __future__ import annotations

from collections.abc import Iterator
from os.path import expanduser
from typing import Any, ClassVar, get_args

from pydantic import BaseModel, ConfigDict, ValidationInfo, field_validator, model_validator
from pydantic_core import PydanticKnownError


class Section(BaseModel):
    """Keys with typed values; no others. `PATHS` are those that may be paths."""

    PATHS: ClassVar[tuple[str, ...]] = ()
    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

    def __hash__(self) -> int:
        return hash(self.model_dump_json())  # pydantic's own fails on a value that is a list or a dictionary

    @model_validator(mode="before")
    @classmethod
    def _empty_is_the_default(cls, values: Any) -> Any:
        """Read a section of which no line is left, `train:`, as one without keys; YAML says null."""
        return {} if values is None else values

    @field_validator("*", mode="before")
    @classmethod
    def _home_is_a_folder(cls, value: Any, info: ValidationInfo) -> Any:
        """Read `~` in paths as a shell would, which saw none of them; some libraries do, and others do not."""
        is_path = isinstance(value, str) and info.field_name in cls.PATHS
        return expanduser(value) if is_path else value  # noqa: PTH111 - pathlib's raises where there is no such home

    @field_validator("*", mode="before")
    @classmethod
    def _no_boolean_is_a_number(cls, value: Any, info: ValidationInfo) -> Any:
        """Refuse `max_steps: yes`, which pydantic reads as 1."""
        if isinstance(value, bool) and info.field_name is not None:
            kinds = {*kinds_in(cls.model_fields[info.field_name].annotation)}
            if bool not in kinds and kinds & {int, float}:
                raise PydanticKnownError("float_type" if float in kinds else "int_type")
        return value


def kinds_in(annotation: Any) -> Iterator[Any]:
    """The kinds of values that an annotation is made of, such as str, list[str] and None."""
    yield annotation
    for inner in get_args(annotation):
        yield from kinds_in(inner)


def section_in(annotation: Any) -> type[Section] | None:
    """The section that a key of this annotation holds: itself, or one of its kinds, or items of a list; or None."""
    return next((kind for kind in kinds_in(annotation) if isinstance(kind, type) and issubclass(kind, Section)), None)
