"""The least that is a recipe, and what validation says of it with changes."""

from __future__ import annotations

from typing import Any

import pytest

from qmixlora.errors import UserError
from qmixlora.recipe import validate

MINIMAL = {"model": {"id": "m"}, "data": {"train": "d.json"}}


def mistakes_in(values: dict[str, Any]) -> str:
    """The message that lists the mistakes in these values."""
    with pytest.raises(UserError) as caught:
        validate(values, "r.yaml")
    return str(caught.value)
