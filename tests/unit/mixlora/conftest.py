"""A session with an adapter, and a batch for it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from qmixlora.data import load_conversations
from qmixlora.recipe import Recipe
from qmixlora.session import Session, open_session


@pytest.fixture
def session(make_recipe: Callable[..., Recipe]) -> Session:
    return open_session(make_recipe(), ["color", "digit"])


@pytest.fixture
def batch(session: Session, data: Path) -> dict[str, Any]:
    rows = load_conversations(str(data / "train.json"))
    return session.collator([rows[i] for i in range(4)])
